//! Skeleton.
/// Skeleton.
pub fn demo() -> anyhow::Result<()> {
    Ok(())
}
