//! `omega join`, and what `omega-agent join` shares with it.

use std::io::{self, BufRead, IsTerminal, Read};
use std::path::Path;

use transport::identity::Identity;
use transport::identity::join::{self, Error, Token};

use super::{Failure, args, show};

/// A token has at most so many bytes.
const MAX_TOKEN: u64 = 1024;

impl From<Error> for Failure {
    fn from(why: Error) -> Self {
        match why {
            Error::Token(_) => Self::usage(why.to_string()),
            _ => Self::failed(why.to_string()),
        }
    }
}

/// Makes this PC a node for this user.
pub(super) fn join(args: &args::Join) -> Result<(), Failure> {
    let folder = args.identity.path()?;
    let token = token(&args.token)?;
    let identity = join::join(&token, &folder, None)?;
    show(&welcome(&identity, &folder))
}

/// The token on the command line, or the line on standard input if that is `-`.
///
/// # Errors
/// It is damaged, or cannot be read.
pub fn token(argument: &str) -> Result<Token, Error> {
    if argument != "-" {
        return argument.trim().parse();
    }
    if io::stdin().is_terminal() {
        eprintln!("Paste the token, then press Enter:");
    }
    let mut text = String::new();
    io::stdin()
        .lock()
        .take(MAX_TOKEN)
        .read_line(&mut text)
        .map_err(|_| Error::Token("it cannot be read from standard input"))?;
    text.trim().parse()
}

/// What to tell who joined.
#[must_use]
pub fn welcome(identity: &Identity, folder: &Path) -> String {
    let expires = super::node::date(
        identity.expires().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
    );
    format!(
        "This PC is the node `{}` ({}) of its household now.\n\
         identity   {}\n\
         household  {}\n\
         until      {expires}\n",
        identity.name(),
        identity.roles(),
        folder.display(),
        identity.authority(),
    )
}
