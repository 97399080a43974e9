//! The lab by hand.

use std::time::Instant;

use lab::Lab;

fn main() -> anyhow::Result<()> {
    let lab = Lab::new("hand")?;
    let lan = lab.network("lan");
    let start = Instant::now();
    let [a, b] = lab.start([lab.pc("alice").on(&lan), lab.pc("bob").on(&lan)])?;
    println!("two PCs are up after {:.1} s", start.elapsed().as_secs_f32());
    println!("{}", a.run(&format!("uname -a; ls -l /dev/kvm; ping -c 3 {}", b.address()))?.ok()?);
    Ok(())
}
