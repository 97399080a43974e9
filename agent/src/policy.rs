//! Who may use what of this PC: the `[[allow]]` tables of `agent.toml`.
//!
//! A table applies to the consoles that one of its patterns names, and to a helper only if it names that helper
//! itself, without `*`: whoever writes `*` thinks of the PCs that run guests. What a node may do is what any table that applies
//! to it says. Without a table the household's consoles may use every volume, and nobody else anything.

use std::fmt;

use crate::config::{Access, Allow};

/// Who asks, as far as it is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asker {
    /// Somebody on a plain connection: whoever reaches this address.
    Unproven,
    /// A node of the household that proved its name by its certificate.
    Node {
        /// Its name.
        name: String,
        /// Whether its certificate says that it is a console, a PC that runs guests.
        console: bool,
    },
}

impl Asker {
    /// The proven name.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Unproven => None,
            Self::Node { name, .. } => Some(name),
        }
    }
}

/// Written as subject of a sentence in refusals and logs.
impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unproven => f.write_str("an unproven peer"),
            Self::Node { name, .. } => write!(f, "node {name}"),
        }
    }
}

/// The rules of one agent. Cheap to ask, and the same as long as the agent runs.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    rules: Vec<Allow>,
    /// The agent's own name, if it has an identity: who has its key may see what it does.
    own: Option<String>,
}

impl Policy {
    /// The rules of a configuration, for an agent with this proven name.
    #[must_use]
    pub fn new(rules: &[Allow], own: Option<String>) -> Self {
        Self { rules: rules.to_vec(), own }
    }

    /// What `asker` may do with a volume of this name, which need not exist. `None`: nothing.
    ///
    /// On plain connections nobody can be told apart, so everybody may do everything: whoever configured them
    /// said so.
    #[must_use]
    pub fn access(&self, asker: &Asker, volume: &str) -> Option<Access> {
        let (name, console) = match asker {
            Asker::Unproven => return Some(Access::Write),
            Asker::Node { name, console } => (name, *console),
        };
        if self.rules.is_empty() {
            return console.then_some(Access::Write);
        }
        let fits = |rule: &&Allow| rule.is_for(name, console) && matches_any(&rule.volumes, volume);
        let rules = self.rules.iter().filter(fits);
        rules.map(|rule| rule.access).max()
    }

    /// So many bytes of memory `asker` may lease, if so much is lent. `None`: none at all.
    #[must_use]
    pub fn memory(&self, asker: &Asker) -> Option<u64> {
        let (name, console) = match asker {
            Asker::Unproven => return Some(u64::MAX),
            Asker::Node { name, console } => (name, *console),
        };
        if self.rules.is_empty() {
            return console.then_some(u64::MAX);
        }
        let rules = self.rules.iter().filter(|rule| rule.is_for(name, console));
        rules.filter_map(|rule| rule.memory).map(|memory| memory.0).max()
    }

    /// Why `asker` may lease no memory, for both logs.
    #[must_use]
    pub fn memory_refusal(&self, asker: &Asker) -> String {
        let mend = if self.rules.is_empty() {
            "no `[[allow]]` in its agent.toml names nodes, so only consoles may"
        } else {
            "no `[[allow]]` in its agent.toml gives it `memory`"
        };
        format!("{asker} may lease no memory: {mend}")
    }

    /// So many vCPUs `asker` may run here, if so many are lent. `None`: none at all.
    #[must_use]
    pub fn vcpus(&self, asker: &Asker) -> Option<u32> {
        let (name, console) = match asker {
            Asker::Unproven => return Some(u32::MAX),
            Asker::Node { name, console } => (name, *console),
        };
        if self.rules.is_empty() {
            return console.then_some(u32::MAX);
        }
        self.rules.iter().filter(|rule| rule.is_for(name, console)).filter_map(|rule| rule.vcpus).max()
    }

    /// Why `asker` may run no vCPUs, for both logs.
    #[must_use]
    pub fn vcpus_refusal(&self, asker: &Asker) -> String {
        let mend = if self.rules.is_empty() {
            "no `[[allow]]` in its agent.toml names nodes, so only consoles may"
        } else {
            "no `[[allow]]` in its agent.toml gives it `vcpus`"
        };
        format!("{asker} may run no vCPUs: {mend}")
    }

    /// Whether `asker` may know who else has leased memory: who runs guests, and this agent itself.
    #[must_use]
    pub fn shows_memory(&self, asker: &Asker) -> bool {
        match asker {
            Asker::Unproven => true,
            Asker::Node { console, .. } => self.is_own(asker) || *console && self.memory(asker).is_some(),
        }
    }

    /// Whether `asker` may know of a volume of this name: it may use it, or it is this agent itself.
    #[must_use]
    pub fn shows(&self, asker: &Asker, volume: &str) -> bool {
        self.is_own(asker) || self.access(asker, volume).is_some()
    }

    /// Whether `asker` may know what this PC has: it may use something of it, or is this agent itself.
    #[must_use]
    pub fn shows_inventory(&self, asker: &Asker) -> bool {
        match asker {
            Asker::Unproven => true,
            Asker::Node { console, .. } if self.rules.is_empty() => *console || self.is_own(asker),
            Asker::Node { name, console } => {
                self.is_own(asker) || self.rules.iter().any(|rule| rule.is_for(name, *console))
            }
        }
    }

    fn is_own(&self, asker: &Asker) -> bool {
        self.own.is_some() && asker.node() == self.own.as_deref()
    }

    /// Why `asker` may not do something with a volume, for both logs. It does not say whether the volume exists.
    #[must_use]
    pub fn refusal(&self, asker: &Asker, volume: &str) -> String {
        let mend = if self.rules.is_empty() {
            "no `[[allow]]` in its agent.toml names nodes, so only consoles may use volumes"
        } else {
            "no `[[allow]]` in its agent.toml gives it that volume"
        };
        format!("{asker} may not use volume {volume}: {mend}")
    }

    /// The rules for people, a line each.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        if self.rules.is_empty() {
            let who = if self.own.is_some() { "consoles of the household" } else { "everybody" };
            return vec![format!("{who} may write every volume, and use what memory and vCPUs there are")];
        }
        self.rules.iter().map(ToString::to_string).collect()
    }
}

impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = self.nodes.len() > 1 || self.nodes.iter().any(|node| node.contains('*'));
        write!(f, "node{} {} may ", if many { "s" } else { "" }, self.nodes.join(", "))?;
        let mut parts = Vec::new();
        if !self.volumes.is_empty() {
            let access = if self.access == Access::Write { "write" } else { "read" };
            parts.push(format!("{access} {}", self.volumes.join(", ")));
        }
        parts.extend(self.memory.map(|memory| format!("lease {memory} of memory")));
        parts.extend(self.vcpus.map(|n| format!("use {n} vCPU{}", if n == 1 { "" } else { "s" })));
        f.write_str(&parts.join(", and "))
    }
}

impl Allow {
    fn is_for(&self, node: &str, console: bool) -> bool {
        if console { matches_any(&self.nodes, node) } else { self.nodes.iter().any(|name| name == node) }
    }
}

fn matches_any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// Whether `name` is what `pattern` describes, in which each `*` stands for any number of characters.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    // Each part in between where it first fits: that leaves the most for those that follow.
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> Asker {
        Asker::Node { name: name.into(), console: true }
    }

    fn helper(name: &str) -> Asker {
        Asker::Node { name: name.into(), console: false }
    }

    fn rule(nodes: &[&str], volumes: &[&str], access: Access) -> Allow {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        Allow { nodes: owned(nodes), volumes: owned(volumes), access, memory: None, vcpus: None }
    }

    #[test]
    fn a_star_stands_for_any_characters_and_everything_else_for_itself() {
        for (pattern, fitting, others) in [
            ("desk", &["desk"][..], &["", "des", "desk2", "adesk", "Desk"][..]),
            ("*", &["", "a", "desk"], &[]),
            ("scratch-*", &["scratch-", "scratch-1"], &["scratch", "a-scratch-1"]),
            ("*-disk", &["a-disk", "-disk"], &["disk", "a-disks"]),
            ("a*b*c", &["abc", "axbxc", "abbcc", "abcbc"], &["ab", "acb", "abcd", "ac"]),
            ("a*a", &["aa", "aba"], &["a", "ab"]),
            ("*ab*ab*", &["abab", "xabyabz"], &["ab", "aab"]),
        ] {
            for name in fitting {
                assert!(matches(pattern, name), "{pattern} {name}");
            }
            for name in others {
                assert!(!matches(pattern, name), "{pattern} {name}");
            }
        }
    }

    #[test]
    fn without_a_table_consoles_may_write_every_volume_and_nobody_else_anything() {
        let policy = Policy::new(&[], Some("attic".into()));
        assert_eq!(policy.access(&node("desk"), "root"), Some(Access::Write));
        assert!(policy.shows_inventory(&node("desk")));
        assert_eq!(policy.access(&helper("shed"), "root"), None);
        assert!(!policy.shows(&helper("shed"), "root") && !policy.shows_inventory(&helper("shed")));
    }

    #[test]
    fn with_tables_a_node_may_do_what_any_table_that_names_it_says_and_no_more() {
        let policy = Policy::new(
            &[
                rule(&["desk", "lap-*"], &["root", "scratch-*"], Access::Read),
                rule(&["desk"], &["scratch-*"], Access::Write),
            ],
            Some("attic".into()),
        );
        assert_eq!(policy.access(&node("desk"), "root"), Some(Access::Read));
        assert_eq!(policy.access(&node("desk"), "scratch-1"), Some(Access::Write));
        assert_eq!(policy.access(&node("lap-7"), "scratch-1"), Some(Access::Read));
        assert_eq!(policy.access(&node("desk"), "secret"), None);
        assert_eq!(policy.access(&node("stranger"), "root"), None, "a console that no table names");
        assert!(!policy.shows_inventory(&node("stranger")));
        assert!(policy.shows_inventory(&node("desk")));
        assert!(policy.refusal(&node("stranger"), "root").contains("node stranger may not use volume root"));
    }

    #[test]
    fn a_helper_needs_its_whole_name_in_a_table() {
        let policy = Policy::new(
            &[rule(&["*", "sh*"], &["root"], Access::Write), rule(&["shed"], &["films"], Access::Read)],
            Some("attic".into()),
        );
        assert_eq!(policy.access(&node("sheep"), "root"), Some(Access::Write));
        for helper in [helper("sheep"), helper("shed")] {
            assert_eq!(policy.access(&helper, "root"), None, "{helper}: `*` means consoles");
        }
        assert!(!policy.shows_inventory(&helper("sheep")));
        assert_eq!(policy.access(&helper("shed"), "films"), Some(Access::Read));
        assert!(policy.shows_inventory(&helper("shed")));
    }

    #[test]
    fn memory_is_leased_by_whom_a_table_gives_some_and_without_tables_by_consoles() {
        let policy = Policy::new(&[], Some("attic".into()));
        assert_eq!(policy.memory(&node("desk")), Some(u64::MAX));
        assert_eq!(policy.memory(&helper("shed")), None);
        assert_eq!(policy.memory(&Asker::Unproven), Some(u64::MAX));
        let lends = |nodes: &[&str], memory| Allow { memory, ..rule(nodes, &["root"], Access::Read) };
        let gib = |n: u64| Some(vmm::units::Bytes(n << 30));
        let rules = [lends(&["desk", "lap-*"], gib(8)), lends(&["desk"], gib(2)), lends(&["den"], None)];
        let policy = Policy::new(&rules, Some("attic".into()));
        assert_eq!(policy.memory(&node("desk")), Some(8 << 30), "what any table says");
        assert_eq!(policy.memory(&node("lap-7")), Some(8 << 30));
        assert_eq!(policy.memory(&helper("lap-7")), None, "`*` means consoles");
        assert_eq!(policy.memory(&node("den")), None);
        let why = policy.memory_refusal(&node("den"));
        assert!(why.contains("node den may lease no memory") && why.contains("`memory`"), "{why}");
        assert!(policy.shows_memory(&node("desk")) && policy.shows_memory(&helper("attic")));
        assert!(!policy.shows_memory(&node("den")) && !policy.shows_memory(&helper("shed")));
    }

    #[test]
    fn vcpus_are_run_by_whom_a_table_gives_some_and_without_tables_by_consoles() {
        let policy = Policy::new(&[], Some("attic".into()));
        assert_eq!(policy.vcpus(&node("desk")), Some(u32::MAX));
        assert_eq!(policy.vcpus(&helper("shed")), None);
        let lends = |nodes: &[&str], vcpus| Allow { vcpus, ..rule(nodes, &["root"], Access::Read) };
        let policy = Policy::new(&[lends(&["desk", "*"], Some(2)), lends(&["desk"], Some(1))], None);
        assert_eq!(policy.vcpus(&node("desk")), Some(2), "what any table says");
        assert_eq!(policy.vcpus(&helper("lap")), None, "`*` means consoles");
        let why = policy.vcpus_refusal(&helper("lap"));
        assert!(why.contains("node lap may run no vCPUs") && why.contains("`vcpus`"), "{why}");
    }

    #[test]
    fn an_agent_shows_itself_everything_and_may_still_use_nothing() {
        for rules in [&[][..], &[rule(&["desk"], &["root"], Access::Read)]] {
            let policy = Policy::new(rules, Some("attic".into()));
            assert!(policy.shows(&helper("attic"), "root") && policy.shows_inventory(&helper("attic")));
            assert_eq!(policy.access(&helper("attic"), "root"), None);
        }
    }

    #[test]
    fn on_plain_connections_nobody_is_told_apart() {
        let policy = Policy::new(&[], None);
        assert_eq!(policy.access(&Asker::Unproven, "root"), Some(Access::Write));
        assert!(policy.shows_inventory(&Asker::Unproven));
    }

    #[test]
    fn a_table_is_told_in_one_line() {
        let mut rule = rule(&["desk", "*"], &["root"], Access::Read);
        rule.vcpus = Some(1);
        rule.memory = Some(vmm::units::Bytes(8 << 30));
        let text = "nodes desk, * may read root, and lease 8G of memory, and use 1 vCPU";
        assert_eq!(rule.to_string(), text);
    }
}
