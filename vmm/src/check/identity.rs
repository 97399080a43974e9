//! Who this PC is to the other PCs of the household, and whether something here does without.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use transport::identity::{Identity, Reloading, folder};

use super::Line;

/// The end of a certificate is told so long before.
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);
/// Where an agent's configuration is.
const AGENT: &str = "/etc/omega/agent.toml";

/// This user's identity.
pub(super) fn line() -> Line {
    let chosen = std::env::var_os("OMEGA_IDENTITY").filter(|path| !path.is_empty()).map(PathBuf::from);
    match chosen.or_else(folder::of_this_user) {
        Some(folder) => of(&folder),
        None => Line::missing("identity", "this user has no home, so no identity").why(WHY),
    }
}

const WHY: &str = "disks on other PCs are reached by mutual TLS; without it only with `insecure = true`";

fn of(folder: &Path) -> Line {
    let name = "identity";
    let identity = match Reloading::find(folder) {
        Ok(Some(identity)) => identity.current(),
        Ok(None) => {
            return Line::missing(name, format!("none in {}", folder.display()))
                .why(WHY)
                .mend("omega ca init (begins a household), or omega join TOKEN (the token is from omega node invite)");
        }
        Err(why) => {
            let what = format!("the one in {} cannot be used", folder.display());
            return Line::degraded(name, what).why(why.to_string());
        }
    };
    let what = describe(&identity);
    let anew =
        format!("omega node invite {}, on the household's first console; then join again", identity.name());
    match identity.expires().duration_since(SystemTime::now()) {
        _ if identity.crl().revokes(identity.serial()) => {
            Line::degraded(name, what).why("its certificate was revoked: nobody accepts it").mend(anew)
        }
        Err(_) => Line::degraded(name, what).why("its certificate has expired: nobody accepts it").mend(anew),
        Ok(left) if left < SOON => {
            let days = left.as_secs() / (24 * 3600);
            Line::degraded(name, what).why(format!("its certificate expires in {days} days")).mend(anew)
        }
        Ok(_) => Line::ok(name, what),
    }
}

fn describe(identity: &Identity) -> String {
    let authority = identity.authority().to_string();
    format!("node {} ({}) of household {authority:.16}…", identity.name(), identity.roles())
}

/// The agent on this PC, if its configuration lets everybody in.
pub(super) fn agent() -> Option<Line> {
    insecure(Path::new(AGENT))
}

/// The keys that matter here of `agent.toml`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Agent {
    insecure: bool,
}

fn insecure(path: &Path) -> Option<Line> {
    let name = "agent";
    let text = match fs::read_to_string(path) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => return None,
        Err(why) => {
            return Some(
                Line::degraded(name, format!("{} cannot be read", path.display())).why(why.to_string()),
            );
        }
        Ok(text) => text,
    };
    match toml::from_str(&text) {
        Ok(Agent { insecure: false }) => {
            Some(Line::ok(name, "configured; it lets nobody in without a certificate"))
        }
        Ok(Agent { insecure: true }) => Some(
            Line::degraded(name, format!("INSECURE: {} says `insecure = true`", path.display()))
                .why("without an identity it lets everybody who reaches it read and write its volumes")
                .mend("omega-agent join TOKEN, then remove the line; the token is from omega node invite"),
        ),
        Err(_) => Some(
            Line::degraded(name, format!("{} has mistakes", path.display()))
                .mend("sudo omega-agent validate"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use transport::identity::testing::Household;
    use transport::identity::{Role, Roles};

    use super::super::State;
    use super::*;

    #[test]
    fn an_identity_is_shown_with_its_name_and_what_is_wrong_with_it() {
        let house = Household::new();
        let good = of(&house.folder(&house.console("desk")));
        assert!(good.state == State::Ok && good.what.contains("node desk (console)"), "{good:?}");
        let expired = of(&house.folder(&house.expired("old", Roles::NONE.with(Role::Console))));
        assert!(expired.state == State::Degraded && expired.why.is_some_and(|why| why.contains("expired")));
        let none = of(&house.path().join("nowhere"));
        assert!(none.state == State::Missing && none.mend.is_some_and(|mend| mend.contains("omega ca init")));
    }

    #[test]
    fn an_agent_that_lets_everybody_in_is_shown() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("agent.toml");
        assert_eq!(insecure(&path), None);
        for (text, state) in [
            ("listen = '127.0.0.1:7420'\n[limits]\nconnections = 3\n", State::Ok),
            ("insecure = true\n[[volume]]\nname = 'v'\n", State::Degraded),
            ("insecure = 3", State::Degraded),
        ] {
            fs::write(&path, text).expect("it writes");
            let line = insecure(&path).expect("a line");
            assert_eq!(line.state, state, "{line:?}");
            assert_eq!(line.what.contains("INSECURE"), text.contains("insecure = true"), "{line:?}");
        }
    }
}
