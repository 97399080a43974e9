//! `omega-agent join`: this PC becomes a node of a household.

use std::path::Path;

use transport::identity::{Role, join};

use crate::Error;
use crate::config::Config;

/// Joins with `token`, as the agent whose configuration is at `config`, and says what to tell the administrator.
/// Without a configuration the identity goes where an agent without one looks for it.
///
/// # Errors
/// The configuration or the token is wrong, or the household's authority refuses.
pub fn join(config: &Path, token: &str) -> Result<String, Error> {
    let config = if config.exists() { Config::load(config)? } else { Config::default() };
    let folder = config.identity_folder();
    let token = vmm::cli::join::token(token)?;
    let identity = join::join(&token, &folder, Some(config.address().port()))?;
    let mut said = vmm::cli::join::welcome(&identity, &folder);
    said += if !identity.roles().has(Role::Agent) {
        "It was not invited as an agent: consoles refuse to use it; invite it with `--role agent`.\n"
    } else if config.address().ip().is_loopback() {
        "The agent listens on loopback only; set `listen` in its configuration, and (re)start it.\n"
    } else {
        "Next: start the agent, or `systemctl restart omega-agent`.\n"
    };
    Ok(said)
}
