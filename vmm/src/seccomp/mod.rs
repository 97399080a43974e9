//! What each thread of `omega run` may ask of the kernel.
//!
//! Each thread gets a filter for its [`Role`], from the table in [`calls`]. Anything else ends the whole
//! process (`SIGSYS`): a guest that took over a thread through a mistake of ours finds no way on to the PC.
//! [`install`] makes every thread that [`devices::thread::spawn`] starts apply its filter first, and
//! the main thread's filter, which covers all others', is applied before any of them exists.
//!
//! Not covered: operations submitted to an io_uring do not pass these filters. The rings' users name only
//! their own files and sockets.

mod allocator;
pub mod calls;
mod explain;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::OnceLock;

use devices::thread::Role;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use calls::{Call, Check};

/// What happens to a thread that makes a call it has no right to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The process ends at once, by `SIGSYS`.
    #[default]
    Kill,
    /// The process ends with a line on stderr that names the thread and the system call.
    Explain,
    /// The call is made, and the kernel's log tells of it (`SECCOMP_RET_LOG`).
    Log,
    /// Nothing is filtered.
    Off,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "kill" => Ok(Self::Kill),
            "explain" => Ok(Self::Explain),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err(format!("`{text}` is not one of `kill`, `explain`, `log`, `off`")),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Explain => "explain",
            Self::Log => "log",
            Self::Off => "off",
        })
    }
}

/// The filters could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The table does not compile: a mistake of ours.
    #[error("The system call filter of {role:?} threads cannot be built")]
    Compile {
        /// Whose.
        role: Role,
        /// Why.
        source: BackendError,
    },
    /// The kernel refuses a filter.
    #[error("The kernel refuses the system call filter of {role:?} threads")]
    Apply {
        /// Whose.
        role: Role,
        /// Why.
        source: seccompiler::Error,
    },
    /// The handler of [`Mode::Explain`] cannot be installed.
    #[error("The handler that explains forbidden system calls cannot be installed")]
    Handler(#[source] io::Error),
    /// No thread can be started for what is to be done before threads are confined.
    #[error("No thread can be started")]
    Thread(#[source] io::Error),
    /// [`install`] was called twice.
    #[error("The system call filters are installed already")]
    Twice,
}

struct Filters {
    mode: Mode,
    programs: BTreeMap<Role, BpfProgram>,
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Builds the filters and has every thread that is started from now on apply its own. The calling thread,
/// the process's main one, applies its filter itself, when it has opened what it needs.
///
/// # Errors
/// A filter cannot be built, or this was called before.
pub fn install(mode: Mode) -> Result<(), Error> {
    let mut programs = BTreeMap::new();
    if mode != Mode::Off {
        for role in Role::ALL {
            programs.insert(role, compile(role, mode)?);
        }
        allocator::look_at_overcommit().map_err(Error::Thread)?;
    }
    if mode == Mode::Explain {
        explain::handle_sigsys().map_err(Error::Handler)?;
    }
    FILTERS.set(Filters { mode, programs }).map_err(|_| Error::Twice)?;
    if mode != Mode::Off && !devices::thread::set_hook(|role| apply(role).map_err(io::Error::other)) {
        return Err(Error::Twice);
    }
    Ok(())
}

/// Confines the calling thread to what `role` needs, for good. Does nothing before [`install`] and in
/// [`Mode::Off`].
///
/// # Errors
/// The kernel refuses the filter.
pub fn apply(role: Role) -> Result<(), Error> {
    let Some(program) = FILTERS.get().and_then(|filters| filters.programs.get(&role)) else {
        return Ok(());
    };
    apply_filter(program).map_err(|source| Error::Apply { role, source })
}

/// What was installed; none before [`install`].
#[must_use]
pub fn mode() -> Option<Mode> {
    FILTERS.get().map(|filters| filters.mode)
}

fn compile(role: Role, mode: Mode) -> Result<BpfProgram, Error> {
    let mismatch = match mode {
        Mode::Kill => SeccompAction::KillProcess,
        Mode::Explain => SeccompAction::Trap,
        Mode::Log => SeccompAction::Log,
        Mode::Off => SeccompAction::Allow,
    };
    let error = |source| Error::Compile { role, source };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for Call { number, check } in calls::of(role) {
        let rules = rules.entry(number).or_default();
        match condition(check).map_err(error)? {
            Some(condition) => {
                let rule = SeccompRule::new(vec![condition]).map_err(error)?;
                if !rules.contains(&rule) {
                    rules.push(rule);
                }
            }
            None => unconditional.push(number),
        }
    }
    // To seccompiler an empty list of rules means any arguments: it replaces narrower ones.
    for number in unconditional {
        rules.insert(number, Vec::new());
    }
    // The only mistake that this can report is one of the table's.
    SeccompFilter::new(rules, mismatch, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(TryInto::try_into)
        .map_err(error)
}

fn condition(check: Check) -> Result<Option<SeccompCondition>, BackendError> {
    let (argument, operator, value) = match check {
        Check::None => return Ok(None),
        Check::Equal { argument, value } => (argument, SeccompCmpOp::Eq, value),
        Check::Masked { argument, mask, value } => (argument, SeccompCmpOp::MaskedEq(mask), value),
    };
    // All checked arguments are C `int`s: the upper half of the register is not theirs.
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map(Some)
}

#[cfg(test)]
#[path = "seccomp_test.rs"]
mod tests;
