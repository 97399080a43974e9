//! The lines of the control socket: one JSON object each. `docs/control.md` shows them.

use serde::{Deserialize, Serialize};

use super::Error;
use crate::units::Bytes;

/// The protocol's version, in every line of both sides.
pub const VERSION: u32 = 1;
/// The longest request, without its line feed. A longer one ends the connection.
pub const LONGEST_REQUEST: usize = 4096;
/// The longest answer that a client takes.
pub const LONGEST_ANSWER: usize = 64 << 20;

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// Chosen by the client; the answer carries it.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What a client may ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Answers with [`Status`](super::Status).
    Status,
    /// Answers with [`Counters`](super::Counters).
    Counters,
    /// Answers with [`Peers`](super::Peers).
    Peers,
    /// Pauses the guest; answers when it stands still.
    Pause,
    /// Lets it go on.
    Resume,
    /// Presses the power button.
    PowerOff,
    /// Ends the guest without asking it.
    Kill,
    /// Answers with the state of vCPUs and devices.
    SaveState,
    /// Answers with a list of [`HelperStatus`](super::HelperStatus).
    MemoryHelpers,
    /// Answers with [`MemoryStatus`](super::MemoryStatus).
    Memory,
    /// Answers with [`coherence::Counters`](crate::memory::coherence::Counters).
    Coherence,
    /// Has everything moved away from a helper; answers with its name among the helpers.
    MemoryDrain {
        /// Its agent as it is configured, its host, or its node.
        helper: String,
    },
    /// Takes memory of another helper; answers when it has given it.
    MemoryAdd {
        /// As `[[memory.helper]]` of a configuration has it.
        helper: Box<crate::config::Helper>,
    },
    /// Moves a vCPU to another PC; answers when it is there.
    CpuMove {
        /// Its number.
        vcpu: u8,
        /// The PC, as in the guest's status.
        node: String,
    },
    /// Moves all vCPUs of a PC to others; answers with how many they were.
    CpuDrain {
        /// The PC, as in the guest's status.
        node: String,
    },
    /// Moves the balloon.
    Balloon {
        /// What the guest is asked to give up.
        target: Bytes,
    },
    /// Tells a console the size of the window that shows it.
    Resize {
        /// Which console.
        console: Console,
        /// Characters across.
        columns: u16,
        /// Lines.
        rows: u16,
    },
}

impl Command {
    /// Whether it may wait for devices or the guest, and so must not hold up others.
    pub(super) fn may_wait(&self) -> bool {
        matches!(
            self,
            Self::Pause
                | Self::Resume
                | Self::SaveState
                | Self::Balloon { .. }
                | Self::MemoryAdd { .. }
                | Self::CpuMove { .. }
                | Self::CpuDrain { .. }
        )
    }
}

/// A console of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Console {
    /// The serial port.
    Serial,
    /// The virtio console.
    Virtio,
}

/// The answer to one request. Answers may come in another order than their requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// [`VERSION`].
    pub version: u32,
    /// The request's; none when it could not be read.
    pub id: Option<u64>,
    /// What it came to.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done; what was asked for, or null.
    Ok(serde_json::Value),
    /// Not done.
    Error(Error),
}

impl Answer {
    /// The answer to the request `id`.
    #[must_use]
    pub fn new(id: Option<u64>, result: Result<serde_json::Value, Error>) -> Self {
        let outcome = match result {
            Ok(value) => Outcome::Ok(value),
            Err(error) => Outcome::Error(error),
        };
        Self { version: VERSION, id, outcome }
    }

    /// The line that carries it, with its line feed.
    #[must_use]
    pub fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_else(|_| {
            // Only a map with keys that are no text cannot be written, and there is none.
            br#"{"version":1,"id":null,"error":{"kind":"failed","message":"The answer cannot be written"}}"#
                .to_vec()
        });
        line.push(b'\n');
        line
    }
}

/// Reads a request's line, without its line feed.
///
/// # Errors
/// The answer that says why it cannot be read.
pub fn read_request(line: &[u8]) -> Result<Request, Answer> {
    /// What every version of a request has.
    #[derive(Deserialize)]
    struct Any {
        version: Option<u32>,
        id: Option<u64>,
    }
    let refuse = |id, why: String| Answer::new(id, Err(Error::Invalid(why)));
    if line.len() > LONGEST_REQUEST {
        return Err(refuse(None, format!("a request is at most {LONGEST_REQUEST} bytes long")));
    }
    // Serde would take a list for an object.
    if !line.trim_ascii_start().starts_with(b"{") {
        return Err(refuse(None, "a request is a JSON object on a line of its own".to_owned()));
    }
    let any: Any = serde_json::from_slice(line).map_err(|why| refuse(None, why.to_string()))?;
    match any.version {
        Some(VERSION) => {}
        Some(other) => {
            return Err(refuse(any.id, format!("version {other} is not spoken here, only {VERSION}")));
        }
        None => return Err(refuse(any.id, format!("`version` is missing; write {VERSION}"))),
    }
    serde_json::from_slice(line).map_err(|why| refuse(any.id, why.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_documented() {
        let read = |text: &str| read_request(text.as_bytes()).map(|request| request.command);
        assert_eq!(read(r#"{"version":1,"id":1,"command":"status"}"#), Ok(Command::Status));
        assert_eq!(read(r#"{"version":1,"id":1,"command":"power-off"}"#), Ok(Command::PowerOff));
        assert_eq!(
            read(r#"{"version":1,"id":1,"command":{"balloon":{"target":"512M"}}}"#),
            Ok(Command::Balloon { target: Bytes(512 << 20) })
        );
        assert_eq!(
            read(r#"{"command":{"resize":{"console":"virtio","columns":80,"rows":25}},"id":0,"version":1}"#),
            Ok(Command::Resize { console: Console::Virtio, columns: 80, rows: 25 })
        );
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_its_id_where_there_is_one() {
        let cases = [
            ("{", None, "EOF while parsing"),
            (r#"[1,2,"status"]"#, None, "a request is a JSON object"),
            ("{}", None, "`version` is missing"),
            (r#"{"version":2,"id":7,"command":"status"}"#, Some(7), "version 2 is not spoken here, only 1"),
            (r#"{"id":7,"command":"status"}"#, Some(7), "`version` is missing"),
            (r#"{"version":1,"id":7,"command":"statsu"}"#, Some(7), "unknown variant `statsu`"),
            (r#"{"version":1,"id":7,"command":"status","x":1}"#, Some(7), "unknown field `x`"),
            (r#"{"version":1,"id":-7,"command":"status"}"#, None, "invalid value"),
            (
                r#"{"version":1,"id":7,"command":{"balloon":{"target":"8 gigs"}}}"#,
                Some(7),
                "`8 gigs` is not a size",
            ),
        ];
        for (line, id, why) in cases {
            let answer = read_request(line.as_bytes()).expect_err(line);
            assert_eq!(answer.id, id, "{line}");
            let Outcome::Error(Error::Invalid(said)) = &answer.outcome else { panic!("{line}: {answer:?}") };
            assert!(said.contains(why), "{line}: {said}");
        }
        let nested = format!(r#"{{"version":1,"id":1,"command":{}"#, "[".repeat(4000));
        assert!(read_request(nested.as_bytes()).is_err(), "deep nesting is an error, not a crash");
    }

    #[test]
    fn answers_read_as_they_were_written() {
        for result in [Ok(serde_json::json!({"a": 1})), Err(Error::NotNow("it starts".into()))] {
            let answer = Answer::new(Some(3), result);
            let line = answer.line();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(serde_json::from_slice::<Answer>(&line).expect("it is an answer"), answer);
        }
        let line = Answer::new(Some(3), Err(Error::NotNow("it starts".into()))).line();
        let text = r#"{"version":1,"id":3,"error":{"kind":"not-now","message":"it starts"}}"#;
        assert_eq!(String::from_utf8_lossy(&line).trim_end(), text);
    }
}
