//! The guest's processors: how many, and on which PCs they are.

use std::collections::HashSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::toml_file::{Checker, KeyPath};
use super::{Guest, Transport, peer};
use crate::memory::coherence::message::{MEMBERS, Member};
use crate::units::{Bytes, Span};

/// The most vCPUs of a guest.
pub const MOST_CPUS: u8 = 64;
/// How many other PCs may run vCPUs of a guest.
const MOST_PLACES: usize = MEMBERS - 1;
/// What the PC that `omega run` runs on is called among those that run vCPUs.
pub const CONSOLE: &str = "console";
/// The most RAM of a guest on several PCs: each of them needs room for all of it.
const MOST_SPANNING: Bytes = Bytes(64 << 30);

/// The guest's processors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cpu {
    /// How many, 1 to 64.
    #[schemars(range(min = 1, max = 64))]
    pub count: u8,
    /// Other PCs that run some of them; the rest, the first vCPU among them, is on this PC.
    pub place: Vec<Place>,
    /// Whose interrupt controllers the guest has, if all of them are on this PC.
    pub interrupt_controllers: InterruptControllers,
}

impl Default for Cpu {
    fn default() -> Self {
        Self { count: 1, place: Vec::new(), interrupt_controllers: InterruptControllers::default() }
    }
}

/// Whose interrupt controllers a guest has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InterruptControllers {
    /// The kernel's (KVM), which are the fastest.
    #[default]
    Kernel,
    /// Omega's own, as of every guest whose vCPUs are on several PCs.
    Userspace,
}

/// A PC that runs some of the guest's vCPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The PC's name: that in its agent's certificate, and the one that commands and messages call it by.
    pub node: String,
    /// How many vCPUs it runs when the guest starts.
    #[schemars(range(min = 1, max = 63))]
    pub count: u8,
    /// How many it may run, should others be moved there (`omega cpu move`); by default `count`.
    #[serde(default)]
    #[schemars(range(min = 1, max = 63))]
    pub room: Option<u8>,
    /// The agent, `host` or `host:port`; by default the host `node`. The port is 7420 by default.
    #[serde(default)]
    pub agent: Option<String>,
    /// Speak plain TCP, neither encrypted nor authenticated, with an agent that has no identity.
    #[serde(default)]
    pub insecure: bool,
    /// What may carry the connection. RDMA does not encrypt what it carries.
    #[serde(default)]
    pub transport: Transport,
    /// Nothing of the guest may cross the network to this PC unencrypted: no RDMA, no plain TCP.
    #[serde(default)]
    pub require_encryption: bool,
    /// How long the guest stands still for this PC when it is away, before it ends; for ever by default.
    #[serde(default)]
    pub patience: Option<Span>,
}

impl Place {
    /// Where its agent is, `host` or `host:port`.
    #[must_use]
    pub fn agent(&self) -> &str {
        self.agent.as_deref().unwrap_or(&self.node)
    }

    /// How many vCPUs it may run.
    #[must_use]
    pub fn room(&self) -> u8 {
        self.room.unwrap_or(self.count)
    }
}

/// Which member of the guest runs which vCPU when it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    members: Vec<Member>,
}

impl Placement {
    /// So many vCPUs on the console node, then so many on each further member; `None`: there are more members than
    /// can be numbered.
    #[must_use]
    pub fn new(counts: &[u8]) -> Option<Self> {
        let mut members = Vec::new();
        for (number, count) in counts.iter().enumerate() {
            let member = u8::try_from(number).ok().and_then(Member::new)?;
            members.extend((0..*count).map(|_| member));
        }
        Some(Self { members })
    }

    /// The member that runs each vCPU, by the vCPU's number: the console node's first, then in the order of
    /// `[[cpu.place]]`.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The numbers of the vCPUs that `member` runs.
    pub fn cpus_of(&self, member: Member) -> impl Iterator<Item = u8> {
        (0..=u8::MAX).zip(&self.members).filter(move |(_, of)| **of == member).map(|(cpu, _)| cpu)
    }

    /// How many vCPUs each member runs, by the member's number.
    #[must_use]
    pub fn counts(&self) -> Vec<u8> {
        let count = self.members.iter().map(|member| usize::from(member.number()) + 1).max().unwrap_or(0);
        let mut counts = vec![0_u8; count];
        for member in &self.members {
            counts[usize::from(member.number())] += 1;
        }
        counts
    }

    /// Whether more than one PC runs vCPUs.
    #[must_use]
    pub fn spans(&self) -> bool {
        self.members.iter().any(|member| member.number() > 0)
    }
}

impl Guest {
    /// Whose interrupt controllers it has: the kernel's know the vCPUs of one PC only.
    #[must_use]
    pub fn interrupt_controllers(&self) -> InterruptControllers {
        if self.placement().spans() {
            InterruptControllers::Userspace
        } else {
            self.cpu.interrupt_controllers
        }
    }

    /// Which member runs which vCPU. The console node is member 0 and runs vCPU 0.
    #[must_use]
    pub fn placement(&self) -> Placement {
        let elsewhere = self.cpu.place.iter().map(|place| place.count);
        let here = elsewhere.clone().fold(self.cpu.count, u8::saturating_sub);
        let counts: Vec<u8> = std::iter::once(here).chain(elsewhere).collect();
        // A configuration that was checked has no more members than can be numbered.
        Placement::new(&counts).unwrap_or(Placement { members: Vec::new() })
    }
}

/// Finds everything in the guest's `cpu` that contradicts itself or the rest of it.
pub(super) fn check(guest: &Guest, checker: &mut Checker<'_>) {
    let cpu = &guest.cpu;
    let root = KeyPath::root();
    let key = root.key("cpu");
    if !(1..=MOST_CPUS).contains(&cpu.count) {
        let what = format!("must be from 1 to {MOST_CPUS}, not {}", cpu.count);
        checker.wrong(&key.key("count"), what);
    }
    if cpu.place.is_empty() {
        return;
    }
    let mut sound = true;
    let (mut nodes, mut agents) = (HashSet::new(), HashSet::new());
    for (index, place) in cpu.place.iter().enumerate() {
        let key = key.key("place").index(index);
        sound &= one(place, &key, checker);
        if !nodes.insert(&place.node) {
            let what = format!("`{}` is a place already; give it a larger `count`", place.node);
            checker.wrong(&key.key("node"), what);
        } else if !agents.insert(place.agent()) {
            let what = format!("`{}` is another place's agent already", place.agent());
            checker.wrong(&key.key("agent"), what);
        }
    }
    let key = key.key("place");
    let elsewhere: u32 = cpu.place.iter().map(|place| u32::from(place.count)).sum();
    if cpu.place.len() > MOST_PLACES {
        let what = format!("are {} PCs; vCPUs run on {MOST_PLACES} others at most", cpu.place.len());
        checker.wrong(&key, what);
    } else if sound && elsewhere >= u32::from(cpu.count) {
        let what = format!(
            "{elsewhere} of the guest's {} vCPUs would be elsewhere; the first one stays on this PC, so raise \
             `cpu.count` or lower this",
            cpu.count
        );
        checker.wrong(&key, what);
    }
    rest_of_the_guest(guest, &root, checker);
}

/// Whether a place's count makes sense; everything that is wrong with the place is noted.
fn one(place: &Place, key: &KeyPath, checker: &mut Checker<'_>) -> bool {
    peer::check_place(place, key, checker);
    if place.patience.is_some_and(|patience| patience.0.is_zero()) {
        checker.wrong(&key.key("patience"), "must be longer than nothing; leave it out to wait for ever");
    }
    if place.count == 0 {
        checker.wrong(&key.key("count"), "must be from 1 to 63, not 0");
    }
    if place.room.is_some_and(|room| !(place.count..MOST_CPUS).contains(&room)) {
        let what = format!("must be from `count`, which is {}, to {}", place.count, MOST_CPUS - 1);
        checker.wrong(&key.key("room"), what);
    }
    if place.node == CONSOLE {
        let what = format!("`{CONSOLE}` is the PC that runs the guest's devices; give this one another name");
        checker.wrong(&key.key("node"), what);
    }
    place.count > 0
}

/// What a guest whose vCPUs are on several PCs cannot have.
fn rest_of_the_guest(guest: &Guest, root: &KeyPath, checker: &mut Checker<'_>) {
    let memory = &guest.memory;
    if memory.local.is_some() {
        let what = "a guest has vCPUs on other PCs (`[[cpu.place]]`) or memory on other PCs, not both in this \
                    version; leave out one of them";
        checker.wrong(&root.key("memory").key("local"), what);
    }
    if memory.size > MOST_SPANNING {
        let what = format!(
            "is {}; each PC that runs vCPUs of a guest has room for all of its RAM, {MOST_SPANNING} at most in \
             this version",
            memory.size
        );
        checker.wrong(&root.key("memory").key("size"), what);
    }
    if !memory.numa.is_empty() {
        let what = "with `[[cpu.place]]` the PCs are the NUMA nodes; leave this out";
        checker.wrong(&root.key("memory").key("numa"), what);
    }
    if guest.balloon.is_some() {
        let what =
            "the RAM of a guest with vCPUs on other PCs cannot be given back in this version; leave this out";
        checker.wrong(&root.key("balloon"), what);
    }
}
