//! The guest's RAM: how much, where it is, and what a lost helper means.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::toml_file::{Checker, KeyPath};
use super::{Transport, peer};
use crate::memory::fault::{PAGE, Pieces};
pub use crate::memory::store::Compress;
use crate::memory::store::{MOST_THAT_HELP, least, suffices};
use crate::units::{Bytes, Span};

/// The least RAM that anything can be started in.
const LEAST: u64 = 1 << 20;
/// The most RAM that the guest's address map has room for.
const MOST: u64 = 8 << 40;
/// The least of it that must be in this PC's memory: what the guest needs at any moment has to fit.
const LEAST_LOCAL: Bytes = Bytes(16 << 20);
/// More helpers than this cannot be numbered.
const MOST_HELPERS: usize = 64;

/// The guest's RAM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// How much.
    pub size: Bytes,
    /// How much of it may be in this PC's memory; the rest is on helpers. All of it by default.
    pub local: Option<Bytes>,
    /// What keeps the guest's memory when a helper is lost.
    pub on_loss: OnLoss,
    /// How long a helper may be away before what it keeps is taken from elsewhere and copied anew, where it is
    /// elsewhere too; 10 s by default.
    pub patience: Option<Span>,
    /// A file on this PC, made at the start and gone at the end, for `on_loss = "local-disk"`.
    pub swap_file: Option<PathBuf>,
    /// Whether pages are compressed on their way to the helpers and back.
    pub compress: Compress,
    /// The PCs that lend memory.
    pub helper: Vec<Helper>,
    /// NUMA nodes; none or one means none is shown to the guest. Sizes must add up to `size`.
    pub numa: Vec<NumaNode>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            size: Bytes(512 << 20),
            local: None,
            on_loss: OnLoss::None,
            patience: None,
            swap_file: None,
            compress: Compress::Auto,
            helper: Vec::new(),
            numa: Vec::new(),
        }
    }
}

/// One NUMA node as the guest sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NumaNode {
    /// Its RAM.
    pub size: Bytes,
    /// Its vCPUs, by number.
    pub cpus: Vec<u8>,
}

/// What keeps the guest's memory when a helper is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnLoss {
    /// Nothing: the guest stands still until the helper is back, and ends if what it kept is gone.
    #[default]
    None,
    /// A second helper: each page is on two.
    Mirror,
    /// The file `swap_file` on this PC.
    LocalDisk,
}

/// A PC whose agent lends memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Helper {
    /// The agent, `host` or `host:port`; the port is 7420 by default.
    pub agent: String,
    /// How much of its memory the guest takes.
    pub size: Bytes,
    /// The name in the agent's certificate. By default `agent`, if that is a host's name without dots; an address
    /// may belong to any agent of the household.
    #[serde(default)]
    pub node: Option<String>,
    /// Speak plain TCP, neither encrypted nor authenticated, with an agent that has no identity.
    #[serde(default)]
    pub insecure: bool,
    /// What may carry the connection. RDMA does not encrypt what it carries.
    #[serde(default)]
    pub transport: Transport,
    /// Nothing of the guest's memory may cross the network to this helper unencrypted: no RDMA, no plain TCP.
    #[serde(default)]
    pub require_encryption: bool,
}

/// Finds everything in `memory`, of a guest with so many `cpus`, that contradicts itself.
pub(super) fn check(memory: &Memory, cpus: u8, checker: &mut Checker<'_>) {
    let key = KeyPath::root().key("memory");
    let size = memory.size;
    if size.0 < LEAST || size.0 > MOST {
        checker.wrong(&key.key("size"), format!("must be from 1M to 8T, not {size}"));
    } else if !is_whole(size) {
        checker.wrong(&key.key("size"), format!("must be a multiple of the page size, 4K; it is {size}"));
    } else if let Some(local) = memory.local {
        elsewhere(memory, local, &key, checker);
    } else {
        nowhere_else(memory, &key, checker);
    }
    numa(memory, cpus, &key, checker);
}

fn is_whole(size: Bytes) -> bool {
    size.0.is_multiple_of(PAGE as u64)
}

/// Keys that mean nothing to a guest whose memory is all here.
fn nowhere_else(memory: &Memory, key: &KeyPath, checker: &mut Checker<'_>) {
    let given = [
        ("on_loss", memory.on_loss != OnLoss::None),
        ("patience", memory.patience.is_some()),
        ("swap_file", memory.swap_file.is_some()),
        ("compress", memory.compress != Compress::Auto),
        ("helper", !memory.helper.is_empty()),
    ];
    for (name, _) in given.iter().filter(|(_, given)| *given) {
        let what = "is for memory on other PCs; say by `local` how much of it stays on this one";
        checker.wrong(&key.key(name), what);
    }
}

fn elsewhere(memory: &Memory, local: Bytes, key: &KeyPath, checker: &mut Checker<'_>) {
    if local < LEAST_LOCAL {
        checker.wrong(&key.key("local"), format!("must be at least {LEAST_LOCAL}, not {local}"));
    } else if local >= memory.size {
        let what =
            format!("must be less than `size`, {}; leave it out for memory on this PC only", memory.size);
        checker.wrong(&key.key("local"), what);
    } else if !is_whole(local) {
        checker.wrong(&key.key("local"), format!("must be a multiple of the page size, 4K; it is {local}"));
    }
    if memory.patience.is_some_and(|patience| patience.0.is_zero()) {
        checker.wrong(&key.key("patience"), "must be longer than nothing");
    }
    swap_file(memory, key, checker);
    helpers(memory, local, key, checker);
}

fn swap_file(memory: &Memory, key: &KeyPath, checker: &mut Checker<'_>) {
    match &memory.swap_file {
        Some(_) if memory.on_loss != OnLoss::LocalDisk => {
            checker.wrong(&key.key("swap_file"), "is for `on_loss = \"local-disk\"` only");
        }
        Some(path) if path.as_os_str().is_empty() => checker.wrong(&key.key("swap_file"), "is empty"),
        None if memory.on_loss == OnLoss::LocalDisk => {
            let what = "`local-disk` needs `swap_file`, the path of a file that does not exist yet";
            checker.wrong(&key.key("on_loss"), what);
        }
        _ => {}
    }
}

fn helpers(memory: &Memory, local: Bytes, key: &KeyPath, checker: &mut Checker<'_>) {
    let mut agents = HashSet::new();
    let piece = Bytes(u64::from(Pieces::new(memory.size).each()) * PAGE as u64);
    let mut sound = true;
    for (index, helper) in memory.helper.iter().enumerate() {
        let key = key.key("helper").index(index);
        peer::check(&helper.into(), &key, checker);
        if !agents.insert(&helper.agent) {
            let what = format!("`{}` is a helper already; give it a larger `size`", helper.agent);
            checker.wrong(&key.key("agent"), what);
        }
        if helper.size < piece {
            let what =
                format!("must be at least {piece}, a piece of this guest's memory, not {}", helper.size);
            checker.wrong(&key.key("size"), what);
            sound = false;
        }
    }
    let key = key.key("helper");
    match memory.helper.len() {
        0 => checker.wrong(
            &KeyPath::root().key("memory").key("local"),
            "the rest of the memory must be somewhere; add a `[[memory.helper]]`",
        ),
        1 if memory.on_loss == OnLoss::Mirror => {
            checker.wrong(&key, "a mirror has two sides; add another `[[memory.helper]]`");
        }
        count if count > MOST_HELPERS => {
            checker.wrong(&key, format!("a guest has at most {MOST_HELPERS} helpers, not {count}"));
        }
        _ if sound => room(memory, local, &key, checker),
        _ => {}
    }
}

/// Whether there is room for everything that is not here, and for a little of what is.
fn room(memory: &Memory, local: Bytes, key: &KeyPath, checker: &mut Checker<'_>) {
    let pieces = Pieces::new(memory.size);
    let piece = u64::from(pieces.each()) * PAGE as u64;
    let copies = if memory.on_loss == OnLoss::Mirror { 2 } else { 1 };
    let sizes = || memory.helper.iter().map(|helper| helper.size.0);
    // No helper keeps two copies of the same.
    let whole: u64 = sizes().map(|size| (size / piece).min(pieces.count().into())).sum();
    if whole >= u64::from(pieces.count()) * copies {
        return;
    }
    let least = least(memory.size.0, local.0);
    let few = memory.helper.len() <= MOST_THAT_HELP;
    if few && suffices(sizes(), copies as usize, least) {
        return;
    }
    let (have, least) = (Bytes(sizes().fold(0, u64::saturating_add)), Bytes(least));
    let what = "what is not on this PC, and a quarter of `local` (512M at most) for pages on their way";
    let must = match (few, copies) {
        (false, _) => {
            let (all, piece) = (Bytes(u64::from(pieces.count()) * piece), Bytes(piece));
            format!("with more than {MOST_THAT_HELP} helpers, {all} in pieces of {piece} must have room")
        }
        (true, 2) => format!("two of them must have {least} each, or all but the largest twice that: {what}"),
        (true, _) => format!("{least} must have room: {what}"),
    };
    checker.wrong(key, format!("the helpers' sizes add up to {have}; {must}"));
}

fn numa(memory: &Memory, cpus: u8, key: &KeyPath, checker: &mut Checker<'_>) {
    let size = memory.size;
    if memory.numa.is_empty() {
        return;
    }
    let numa = key.key("numa");
    let sum = memory.numa.iter().try_fold(0u64, |sum, node| sum.checked_add(node.size.0));
    if sum != Some(size.0) {
        let sum = sum.map_or("more than anything".to_owned(), |sum| Bytes(sum).to_string());
        checker.wrong(&numa, format!("the nodes' sizes add up to {sum}, but `memory.size` is {size}"));
    }
    let mut owner = HashMap::new();
    for (index, node) in memory.numa.iter().enumerate() {
        let key = numa.index(index);
        if node.size.0 == 0 || !is_whole(node.size) {
            checker.wrong(&key.key("size"), "must be a multiple of the page size, 4K, and not 0");
        }
        for (at, cpu) in node.cpus.iter().enumerate() {
            let key = key.key("cpus").index(at);
            if *cpu >= cpus {
                let last = cpus.saturating_sub(1);
                checker.wrong(&key, format!("there is no vCPU {cpu}; they are numbered 0 to {last}"));
            } else if let Some(before) = owner.insert(*cpu, index) {
                checker.wrong(&key, format!("vCPU {cpu} is in `memory.numa[{before}]` already"));
            }
        }
    }
    let homeless: Vec<String> =
        (0..cpus).filter(|cpu| !owner.contains_key(cpu)).map(|cpu| cpu.to_string()).collect();
    if !homeless.is_empty() {
        checker.wrong(&numa, format!("vCPU {} is in no node; each must be in one", homeless.join(", ")));
    }
}
