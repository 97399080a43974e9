//! What this PC can and cannot do for Omega, each with its mend: `omega check`.

mod devices;
mod identity;
mod kernel;
mod processor;
mod sys;
mod userfault;

use std::fmt;

use serde::Serialize;

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is there.
    Ok,
    /// It is there, but less of it than there could be.
    Degraded,
    /// It is not there.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What it is called: stable, for programs.
    pub name: &'static str,
    /// How it stands.
    pub state: State,
    /// Whether no guest can run without it.
    pub required: bool,
    /// What was found.
    pub what: String,
    /// What it is needed for, or why it is as it is.
    pub why: Option<String>,
    /// What to do about it, where something can be done: a command where there is one.
    pub mend: Option<String>,
}

impl Line {
    fn new(name: &'static str, state: State, what: impl Into<String>) -> Self {
        Self { name, state, required: false, what: what.into(), why: None, mend: None }
    }

    fn ok(name: &'static str, what: impl Into<String>) -> Self {
        Self::new(name, State::Ok, what)
    }

    fn degraded(name: &'static str, what: impl Into<String>) -> Self {
        Self::new(name, State::Degraded, what)
    }

    fn missing(name: &'static str, what: impl Into<String>) -> Self {
        Self::new(name, State::Missing, what)
    }

    fn required(mut self) -> Self {
        self.required = true;
        self
    }

    fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

/// Everything that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether guests can run here.
    pub guests_can_run: bool,
    /// Why not.
    pub obstacle: Option<String>,
    /// What was looked at.
    pub lines: Vec<Line>,
}

impl Report {
    fn of(lines: Vec<Line>) -> Self {
        let obstacle = lines.iter().find(|line| line.required && line.state == State::Missing);
        let obstacle = obstacle.map(|line| line.what.clone());
        Self { guests_can_run: obstacle.is_none(), obstacle, lines }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            let state = match line.state {
                State::Ok => "ok",
                State::Degraded => "degraded",
                State::Missing => "missing",
            };
            writeln!(f, "{state:9} {:16} {}", line.name, line.what)?;
            for (label, text) in [("why:", &line.why), ("mend:", &line.mend)] {
                if let Some(text) = text {
                    writeln!(f, "{:9} {:16} {label:5} {text}", "", "")?;
                }
            }
        }
        match &self.obstacle {
            None => writeln!(f, "\nGuests can run here."),
            Some(why) => writeln!(f, "\nGuests cannot run here: {why}."),
        }
    }
}

/// Looks at everything. Takes up to a few seconds on a PC whose KVM is in doubt; changes nothing.
#[must_use]
pub fn report() -> Report {
    let mut lines = processor::lines();
    lines.push(kernel::version());
    lines.push(kernel::io_uring());
    lines.extend(userfault::lines());
    lines.push(kernel::seccomp());
    lines.push(kernel::ktls());
    lines.extend(kernel::memory());
    lines.extend(kernel::limits());
    lines.push(identity::line());
    lines.extend(identity::agent());
    lines.push(devices::tap());
    lines.push(devices::rdma());
    lines.push(devices::iommu());
    lines.push(devices::gpus());
    Report::of(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_required_thing_that_is_missing_keeps_guests_from_running() {
        let fine = Report::of(vec![Line::ok("kvm", "there").required(), Line::missing("rdma", "none")]);
        assert!(fine.guests_can_run, "{fine}");
        let slow = Report::of(vec![Line::degraded("kvm", "slow").required()]);
        assert!(slow.guests_can_run, "{slow}");
        let not = Report::of(vec![Line::missing("kvm", "no /dev/kvm").required().mend("buy one")]);
        assert!(!not.guests_can_run);
        let text = not.to_string();
        assert!(text.contains("missing   kvm"), "{text}");
        assert!(
            text.contains("mend: buy one") && text.ends_with("Guests cannot run here: no /dev/kvm.\n"),
            "{text}"
        );
    }

    #[test]
    fn what_is_not_ok_says_how_to_mend_it_or_why_it_is_so() {
        for line in report().lines {
            let told = line.mend.is_some() || line.why.is_some();
            assert!(line.state == State::Ok || told, "{line:?}");
            assert!(!line.what.is_empty() && !line.what.contains('\n'), "{line:?}");
        }
    }
}
