//! The escape key: what a person at a terminal tells Omega and not the guest.

/// The escape key, Ctrl-].
const KEY: u8 = 0x1d;

/// What was asked behind the escape key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `q`: leave. `omega console` detaches; `omega run` asks the guest to power off, and ends it the second
    /// time.
    Quit,
    /// `k`: end the guest without asking it.
    Kill,
    /// `p`: pause the guest, or resume it.
    Pause,
    /// Anything else: say what there is.
    Help,
}

/// Splits keystrokes into the guest's and Omega's.
#[derive(Debug, Default)]
pub struct Escape {
    open: bool,
}

impl Escape {
    /// Takes keystrokes; the guest's are added to `input`, Omega's are returned. The escape key twice is
    /// one for the guest.
    pub fn feed(&mut self, keys: &[u8], input: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for key in keys {
            if !std::mem::take(&mut self.open) {
                match *key {
                    KEY => self.open = true,
                    other => input.push(other),
                }
                continue;
            }
            match *key {
                KEY => input.push(KEY),
                b'q' | b'Q' | b'.' => commands.push(Command::Quit),
                b'k' | b'K' => commands.push(Command::Kill),
                b'p' | b'P' => commands.push(Command::Pause),
                _ => commands.push(Command::Help),
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_takes_one_key_from_the_guest_and_twice_sends_itself() {
        let mut escape = Escape::default();
        let mut input = Vec::new();
        assert_eq!(escape.feed(b"ls\r\x03\x1d", &mut input), []);
        assert_eq!(
            escape.feed(b"qx\x1d\x1d\x1d?\x1dk\x1dp", &mut input),
            [Command::Quit, Command::Help, Command::Kill, Command::Pause]
        );
        assert_eq!(input, b"ls\r\x03x\x1d");
    }
}
