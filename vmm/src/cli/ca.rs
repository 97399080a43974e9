//! `omega ca`: the household begins.

use std::path::{Path, PathBuf};

use transport::identity::authority::Authority;
use transport::identity::{Error, Identity, NodeName, Role, folder};

use super::args::{CaInit, IdentityFolder};
use super::{Failure, show};

impl From<Error> for Failure {
    fn from(why: Error) -> Self {
        match why {
            Error::Name(_) | Error::Role(_) => Self::usage(why.to_string()),
            _ => Self::failed(why.to_string()),
        }
    }
}

impl IdentityFolder {
    /// The folder that was chosen, or this user's.
    pub(super) fn path(&self) -> Result<PathBuf, Failure> {
        let chosen = self.identity.clone().filter(|path| !path.as_os_str().is_empty());
        chosen.or_else(folder::of_this_user).ok_or_else(|| {
            Failure::usage("This user has no home; say where the identity is with --identity DIR".to_owned())
        })
    }

    /// The authority's folder beside it.
    pub(super) fn authority(&self) -> Result<PathBuf, Failure> {
        // Without the dots and slashes at its end a folder has a name.
        let identity: PathBuf = self.path()?.components().collect();
        Ok(identity.with_file_name("ca"))
    }
}

/// Makes the authority, and this PC's own identity as a console.
pub(super) fn init(args: &CaInit) -> Result<(), Failure> {
    let (identity, folder) = (args.identity.path()?, args.identity.authority()?);
    if let Some(node) = present(&identity)? {
        return Err(Failure::failed(format!(
            "This PC is the node `{node}` of a household already, by {}; a household begins where none is",
            identity.display()
        )));
    }
    let name = match &args.node {
        Some(name) => name.clone(),
        None => own_name()?,
    };
    let house = args.name.trim();
    if house.is_empty() || house.len() > 40 || house.chars().any(char::is_control) {
        return Err(Failure::usage(
            "--name is what people call the household, 1 to 40 characters".to_owned(),
        ));
    }
    let authority = match Authority::init(&folder, house) {
        // Made by a first try that did not come to the identity.
        Err(Error::AuthorityExists(_)) => Authority::open(&folder)?,
        other => other?,
    };
    authority.make_own(&name, Role::Console.into(), &identity)?;
    show(&format!(
        "The household `{house}` has begun, and this PC is its console `{name}`.\n\
         identity   {}\n\
         authority  {}\n\
         SHA-256    {}\n\
         Keep a copy of the authority's folder where nobody else finds it: who has it can make nodes.\n\
         Next: `omega node invite NAME`, for each PC that lends something.\n",
        identity.display(),
        folder.display(),
        authority.fingerprint(),
    ))
}

/// The name of the node whose identity is in `folder`.
fn present(folder: &Path) -> Result<Option<String>, Failure> {
    if !folder.join(folder::NODE).exists() {
        return Ok(None);
    }
    Ok(Some(Identity::load(folder)?.name().to_owned()))
}

fn own_name() -> Result<NodeName, Failure> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    NodeName::of_host(host.trim()).ok_or_else(|| {
        Failure::usage(format!("The host name `{}` is no name for a node; give one with --node", host.trim()))
    })
}
