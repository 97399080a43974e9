//! Guests whose memory is on other PCs.

mod debian;
mod leases;
mod life;
mod loss;

use anyhow::{Context, Result};
use lab::Guest;
use lab::pc::Pc;

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    (
        "memory::debian_compiles_with_most_of_its_memory_elsewhere_and_a_helper_dies",
        debian::debian_compiles_while_a_helper_dies,
    ),
    ("memory::what_is_not_lent_is_said_in_one_line", leases::what_is_not_lent_is_said_in_one_line),
    (
        "memory::a_helper_with_no_memory_to_spare_keeps_what_it_lent_and_refuses_more",
        leases::a_helper_with_no_memory_to_spare,
    ),
    (
        "memory::what_a_dead_console_had_leased_is_cleared_and_free_again",
        leases::what_a_dead_console_had_leased,
    ),
    (
        "memory::a_paged_guest_is_paused_and_reboots_and_what_it_freed_is_free_again",
        life::a_paged_guest_is_paused_and_reboots,
    ),
    (
        "memory::a_lost_helper_stops_the_guest_as_a_whole_until_it_is_back",
        loss::a_lost_helper_stops_the_guest_as_a_whole,
    ),
    (
        "memory::a_helper_is_drained_while_the_guest_runs_and_switched_off",
        loss::a_helper_is_drained_and_switched_off,
    ),
];

/// The mini guest with three quarters of its RAM elsewhere.
fn mini(steps: &str, pattern: &str, on_loss: &str) -> Guest {
    Guest::mini("mini", steps)
        .cpus(2)
        .memory("192M")
        .cmdline(&format!("omega.pattern={pattern}"))
        .paged("48M", &format!("on_loss = \"{on_loss}\""))
}

/// What an agent lends, in bytes.
struct Lent {
    /// The most that guests may store now.
    leased: u64,
    /// What they have stored.
    used: u64,
}

fn lent(pc: &Pc) -> Result<Lent> {
    let said = pc.run("omega-agent memory --json")?.ok()?;
    let value: serde_json::Value = serde_json::from_str(&said)?;
    let number = |key: &str| value[key].as_u64().with_context(|| said.clone());
    Ok(Lent { leased: number("leased")?, used: number("used")? })
}

/// What an agent has stored, in bytes.
fn stored(pc: &Pc) -> Result<u64> {
    lent(pc).map(|lent| lent.used)
}
