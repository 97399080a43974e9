//! What keeps strangers from this PC: its identity, or the word that there is none.

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use transport::identity::{self, Identity, NodeName, Reloading, Role, Security};

use crate::config::Config;
use crate::policy::Policy;

/// What `insecure = true` means.
pub const INSECURE: &str = "whoever reaches this address may read and write every volume, and whoever listens on the \
                            network sees what they hold: connections are plain TCP";
/// The end of a certificate is told so long before.
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// The agent cannot be protected as its configuration says.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Everybody on the network could use the volumes.
    #[error(
        "Nothing keeps strangers from {address}: this PC has no identity in {identity}; get a token by `omega node \
         invite NAME` on the household's first console and run `omega-agent join TOKEN` here (or listen on \
         127.0.0.1; or write `insecure = true` on a network where you trust everybody)",
        identity = identity.display()
    )]
    Open {
        /// The address.
        address: SocketAddr,
        /// Where an identity was looked for.
        identity: PathBuf,
    },
    /// The policy names nodes, and no node can prove that it is one of them.
    #[error(
        "`[[allow]]` names nodes, but without an identity in {identity} nobody can prove a name; get a token by \
         `omega node invite NAME` on the household's first console and run `omega-agent join TOKEN` here",
        identity = identity.display()
    )]
    Unproven {
        /// Where an identity was looked for.
        identity: PathBuf,
    },
    /// There is an identity, and it cannot be used. The agent does not go on without it.
    #[error("{0}")]
    Identity(#[from] identity::Error),
    /// `insecure` stands beside an identity's folder in which there is none.
    #[error(
        "`insecure = true` would serve everybody on {address}, but {identity} is there and no identity is in it: \
         run `omega-agent join TOKEN` again and remove `insecure`, or remove the folder if this PC is to have none",
        identity = identity.display()
    )]
    Emptied {
        /// The address.
        address: SocketAddr,
        /// Where the identity should be.
        identity: PathBuf,
    },
    /// This PC had an identity, and it is gone.
    #[error(
        "This PC was the node {node}, and its identity in {identity} is gone; run `omega-agent join TOKEN` again, or \
         remove {mark} if it is to be served without one, by plain TCP",
        identity = identity.display(), mark = mark.display()
    )]
    Lost {
        /// Its name then.
        node: String,
        /// Where the identity was looked for.
        identity: PathBuf,
        /// What remembers it.
        mark: PathBuf,
    },
    /// Guests would refuse this agent.
    #[error(
        "{name} in {identity} is no agent by its certificate; run `omega node invite NAME --role agent` on the \
         household's first console and join with its token",
        identity = identity.display()
    )]
    NoAgent {
        /// The node's name.
        name: String,
        /// Where its identity is.
        identity: PathBuf,
    },
}

/// How connections are made, and who may do what over them.
pub struct Protection {
    /// How connections are protected.
    pub security: Security,
    /// Who may use what.
    pub policy: Policy,
    /// What an administrator should know, a line each.
    pub warnings: Vec<String>,
}

impl Protection {
    /// Of a configuration and the identity that it names.
    ///
    /// # Errors
    /// Strangers could use the volumes, nobody whom the policy names could prove it, or the identity is damaged.
    pub fn of(config: &Config) -> Result<Self, Error> {
        match identity_of(config)? {
            Some(identity) => Self::proven(config, identity),
            None => Self::plain(config),
        }
    }

    fn proven(config: &Config, identity: Arc<Reloading>) -> Result<Self, Error> {
        let current = identity.current();
        if !current.roles().has(Role::Agent) {
            let (name, identity) = (current.name().to_owned(), config.identity_folder());
            return Err(Error::NoAgent { name, identity });
        }
        let mut warnings: Vec<String> = expiry(&current).into_iter().collect();
        if config.insecure {
            warnings.push(
                "`insecure = true` does nothing here: this PC has an identity, so every connection is TLS; \
                 remove the line"
                    .to_owned(),
            );
        }
        let policy = Policy::new(&config.allow, Some(current.name().to_owned()));
        Ok(Self { security: Security::Tls(identity), policy, warnings })
    }

    fn plain(config: &Config) -> Result<Self, Error> {
        let (address, identity) = (config.address(), config.identity_folder());
        let open = !address.ip().is_loopback();
        if open && !config.insecure {
            return Err(Error::Open { address, identity });
        }
        if !config.allow.is_empty() {
            return Err(Error::Unproven { identity });
        }
        if config.insecure && identity.exists() {
            return Err(Error::Emptied { address, identity });
        }
        if let Some(node) = joined(config) {
            return Err(Error::Lost { node, identity, mark: mark(config) });
        }
        let warnings = if open { vec![format!("INSECURE: {address}: {INSECURE}")] } else { Vec::new() };
        Ok(Self { security: Security::Plain, policy: Policy::new(&[], None), warnings })
    }

    /// Who this agent is, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.security {
            Security::Plain => {
                "no identity: plain TCP, whoever reaches the address may do everything".to_owned()
            }
            Security::Tls(identity) => {
                let identity = identity.current();
                let authority = identity.authority().to_string();
                format!("node {} of household {:.16}…: mutual TLS", identity.name(), authority)
            }
        }
    }
}

/// The identity, `None` if there is none and none was named.
fn identity_of(config: &Config) -> Result<Option<Arc<Reloading>>, Error> {
    let folder = config.identity_folder();
    Ok(if config.names_identity() { Some(Reloading::load(&folder)?) } else { Reloading::find(&folder)? })
}

/// What remembers that this PC had an identity, beside its leases.
fn mark(config: &Config) -> PathBuf {
    config.state_folder().join("joined")
}

/// The node that this PC was when it last served with an identity. A mark that cannot be read is one all the same.
fn joined(config: &Config) -> Option<String> {
    let unknown = || "?".to_owned();
    match fs::read_to_string(mark(config)) {
        Ok(text) => Some(text.trim().parse().map_or_else(|_| unknown(), |name: NodeName| name.to_string())),
        Err(why) if why.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(unknown()),
    }
}

/// Remembers that this PC has an identity: should that be lost, an agent that would be plain does not start, however
/// long ago somebody wrote `insecure = true`.
///
/// # Errors
/// It cannot be stored.
pub(crate) fn remember(config: &Config, security: &Security) -> io::Result<()> {
    let Security::Tls(identity) = security else { return Ok(()) };
    let name = identity.current().name().to_owned();
    let mark = mark(config);
    if fs::read_to_string(&mark).is_ok_and(|text| text.trim() == name) {
        return Ok(());
    }
    let folder = config.state_folder();
    fs::create_dir_all(&folder)?;
    let mut file = fs::File::create(mark)?;
    file.write_all((name + "\n").as_bytes())?;
    // It has to outlive a power cut as the identity does.
    file.sync_all()?;
    fs::File::open(folder)?.sync_all()
}

/// A line about a certificate that ends soon.
pub(crate) fn expiry(identity: &Identity) -> Option<String> {
    let name = identity.name();
    match identity.expires().duration_since(SystemTime::now()) {
        Err(_) => {
            Some(format!("The certificate of node {name} has expired: nobody accepts it; invite it anew"))
        }
        Ok(left) if left < SOON => {
            let days = left.as_secs() / (24 * 3600);
            Some(format!("The certificate of node {name} expires in {days} days; invite it anew before"))
        }
        Ok(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use transport::identity::testing::Household;
    use transport::identity::{Role, Roles};

    use super::*;
    use crate::config::{Access, Allow};

    fn config(listen: &str, identity: Option<PathBuf>) -> (tempfile::TempDir, Config) {
        let folder = tempfile::tempdir().expect("a folder");
        let state = Some(folder.path().to_owned());
        let config = Config { listen: listen.into(), state, identity, ..Config::default() };
        (folder, config)
    }

    fn anybody() -> Allow {
        let all = vec!["*".to_owned()];
        Allow { nodes: all.clone(), volumes: all, access: Access::Read, memory: None, vcpus: None }
    }

    #[test]
    fn a_network_address_needs_an_identity_or_the_word_insecure() {
        let (_folder, mut config) = config("0.0.0.0:7420", None);
        let said = Protection::of(&config).err().expect("refused").to_string();
        assert!(said.contains("0.0.0.0:7420") && said.contains("omega-agent join"), "{said}");
        config.insecure = true;
        let plain = Protection::of(&config).expect("said");
        assert!(matches!(plain.security, Security::Plain));
        assert!(plain.warnings[0].contains("INSECURE"), "{:?}", plain.warnings);
    }

    #[test]
    fn loopback_is_plain_without_a_word_but_not_with_a_policy_that_names_nodes() {
        let (_folder, mut config) = config("127.0.0.1:7420", None);
        assert!(Protection::of(&config).expect("loopback").warnings.is_empty());
        config.allow.push(anybody());
        assert!(matches!(Protection::of(&config), Err(Error::Unproven { .. })));
    }

    #[test]
    fn with_an_identity_every_address_is_tls_and_insecure_does_nothing() {
        let house = Household::new();
        let folder = house.folder(&house.agent("attic"));
        for listen in ["127.0.0.1:7420", "0.0.0.0:7420"] {
            let (_state, mut config) = config(listen, Some(folder.clone()));
            config.insecure = true;
            config.allow.push(anybody());
            let protection = Protection::of(&config).expect("an identity");
            assert!(matches!(protection.security, Security::Tls(_)), "{listen}");
            assert!(
                protection.warnings.iter().any(|w| w.contains("does nothing")),
                "{:?}",
                protection.warnings
            );
            assert!(protection.describe().contains("node attic"), "{}", protection.describe());
        }
    }

    #[test]
    fn an_identity_that_is_damaged_or_lost_where_one_was_named_does_not_make_the_agent_plain() {
        let house = Household::new();
        let folder = house.folder(&house.agent("attic"));
        let (_state, mut named) = config("127.0.0.1:7420", Some(folder.clone()));
        fs::remove_file(folder.join("node.key")).expect("it goes");
        assert!(matches!(Protection::of(&named), Err(Error::Identity(_))));
        named.identity = Some(folder.join("nowhere"));
        assert!(matches!(Protection::of(&named), Err(Error::Identity(_))));
        // Also where it is looked for without a word.
        let (state, unnamed) = config("127.0.0.1:7420", None);
        assert!(matches!(Protection::of(&unnamed).expect("none").security, Security::Plain));
        fs::create_dir(state.path().join("identity")).expect("a folder");
        fs::copy(folder.join("ca.pem"), state.path().join("identity/ca.pem")).expect("it copies");
        assert!(matches!(Protection::of(&unnamed), Err(Error::Identity(_))));
    }

    #[test]
    fn an_old_word_insecure_does_not_make_an_agent_plain_that_lost_its_identity() {
        let house = Household::new();
        let folder = house.folder(&house.agent("attic"));
        let (state, mut config) = config("0.0.0.0:7420", None);
        config.insecure = true;
        let identity = state.path().join("identity");
        fs::create_dir(&identity).expect("a folder");
        assert!(matches!(Protection::of(&config), Err(Error::Emptied { .. })), "it is there, and empty");
        for name in ["ca.pem", "node.pem", "node.key", "crl.pem"] {
            fs::copy(folder.join(name), identity.join(name)).expect("it copies");
        }
        let protection = Protection::of(&config).expect("an identity");
        remember(&config, &protection.security).expect("it stores");
        fs::remove_dir_all(&identity).expect("it goes");
        let said = Protection::of(&config).err().expect("it was a node").to_string();
        assert!(said.contains("was the node attic") && said.contains("joined"), "{said}");
        config.listen = "127.0.0.1:7420".into();
        assert!(matches!(Protection::of(&config), Err(Error::Lost { .. })), "nor plain on loopback");
        fs::remove_file(state.path().join("joined")).expect("it goes");
        assert!(matches!(Protection::of(&config).expect("said").security, Security::Plain));
    }

    #[test]
    fn a_node_that_is_no_agent_does_not_serve() {
        let house = Household::new();
        let folder = house.folder(&house.console("desk"));
        let (_state, config) = config("127.0.0.1:7420", Some(folder));
        assert!(matches!(Protection::of(&config), Err(Error::NoAgent { .. })));
    }

    #[test]
    fn a_certificate_that_has_expired_is_told() {
        let house = Household::new();
        let agent = Roles::NONE.with(Role::Agent);
        let expired = house.expired("attic", agent);
        assert!(expiry(&expired).expect("told").contains("has expired"));
        assert_eq!(expiry(&house.agent("attic")), None);
    }
}
