//! `omega node`: who belongs to the household.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::Serialize;
use transport::blocking::Client;
use transport::identity::authority::{Authority, Node};
use transport::identity::join::{self, Invitation, MAX_TRIES, Outcome};
use transport::identity::{Crl, Identity, MAX_CRL, Reloading, Role, Roles, Security, revocation};
use transport::wire::{Class, Status};

use super::args::{NodeInvite, NodeList, NodeRevoke};
use super::{Failure, args, json, show};

/// Who is invited for longer is invited wrongly.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

pub(super) fn obey(args: &args::Node) -> Result<(), Failure> {
    match args {
        args::Node::Invite(args) => invite(args),
        args::Node::List(args) => list(args),
        args::Node::Drain(args) => super::drain::drain(args),
        args::Node::Revoke(args) => revoke(args),
    }
}

fn invite(args: &NodeInvite) -> Result<(), Failure> {
    let authority = Authority::open(&args.identity.authority()?)?;
    let life = args.expires.0;
    if !(Duration::from_secs(1)..=LONGEST).contains(&life) {
        return Err(Failure::usage("--expires is between 1s and 168h".to_owned()));
    }
    let listen_failed = |why: io::Error| {
        let at = args.listen.map_or_else(|| "any address".to_owned(), |address| address.to_string());
        Failure::failed(format!("Cannot listen at {at}: {why}; choose another with --listen ADDR:PORT"))
    };
    let listener = join::listen(args.listen).map_err(listen_failed)?;
    let bound = listener.local_addr().map_err(listen_failed)?;
    let addresses = if bound.ip().is_unspecified() {
        join::addresses(bound.port()).map_err(listen_failed)?
    } else {
        vec![bound]
    };
    // From here on a signal withdraws the token.
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(io::Error::from)?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&signals, flags).map_err(io::Error::from)?;

    let roles: Roles = args.roles.iter().copied().collect();
    if let Some(warning) = taken(&args.name.to_string(), &authority.nodes()?, seconds()) {
        eprintln!("{warning}\n");
    }
    let invitation = Invitation::new(&authority, &args.name, roles, life, listener, addresses)?;
    tell(args, roles, invitation.token())?;
    let stop = || signals.read_signal().is_ok_and(|signal| signal.is_some());
    match invitation.wait(&stop) {
        Outcome::Joined(joined) => {
            let (name, from) = (&joined.node.name, joined.from.ip().to_canonical());
            if joined.confirmed {
                eprintln!("`{name}` has joined, from {from}.");
                return Ok(());
            }
            Err(Failure::failed(format!(
                "{from} was made the node `{name}` but did not say that it stored its certificate; if it is not \
                 there, invite it again, and if that was somebody else, `omega node revoke {name}`"
            )))
        }
        Outcome::Expired => Err(Failure::failed(format!(
            "Nobody joined within {}; the token is worthless now, invite again",
            span(life)
        ))),
        Outcome::Void => Err(Failure::failed(format!(
            "{MAX_TRIES} wrong tokens were tried, so this one is withdrawn: a PC on this network is guessing; \
             invite again, with --listen at an address that it does not reach"
        ))),
        Outcome::Stopped => Err(Failure::failed("Withdrawn; the token is worthless now".to_owned())),
        Outcome::Failed(why) => Err(why.into()),
    }
}

/// What to consider before somebody is invited by a name that one of `nodes` has.
fn taken(name: &str, nodes: &[Node], now: u64) -> Option<String> {
    let valid = |node: &&Node| node.name == name && node.revoked.is_none() && node.expires > now;
    let node = nodes.iter().rev().find(valid)?;
    let since = date(node.issued);
    Some(format!(
        "There is a node `{name}` since {since}. Whoever joins with this token has its name and all that is \
         allowed to it. That is right to renew its certificate; for another PC choose another name, and for one \
         that is lost run `omega node revoke {name}` first."
    ))
}

/// Says what to do with the token. The token alone is on standard output, for programs. It is not part of the
/// command: that is seen by everybody who may list processes, and stays in the shell's history.
fn tell(args: &NodeInvite, roles: Roles, token: &join::Token) -> Result<(), Failure> {
    let command = if roles.has(Role::Agent) { "sudo omega-agent join -" } else { "omega join -" };
    eprintln!("On the PC that becomes `{}` ({roles}), within {}:\n", args.name, span(args.expires.0));
    eprintln!("  {command}\n\nand then, as the line that it reads:\n");
    let mut out = io::stdout();
    show(&format!("{token}\n"))?;
    out.flush()?;
    eprintln!("\nThis PC waits for it; Ctrl-C withdraws the token.");
    Ok(())
}

/// How a certificate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Standing {
    Valid,
    /// A newer one of the same name and roles was made.
    Replaced,
    Expired,
    Revoked,
}

#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    node: Node,
    state: Standing,
}

fn list(args: &NodeList) -> Result<(), Failure> {
    let authority = Authority::open(&args.identity.authority()?)?;
    let all = judge(authority.nodes()?, seconds());
    if args.json {
        return show(&format!("{}\n", json(&all)?));
    }
    show(&table(&all, seconds()))
}

/// How each of `nodes`, oldest first, stands at `now`.
fn judge(nodes: Vec<Node>, now: u64) -> Vec<Listed> {
    let mut newer = BTreeSet::new();
    let mut all: Vec<_> = nodes
        .into_iter()
        .rev()
        .map(|node| {
            let first = newer.insert((node.name.clone(), node.roles.clone()));
            let state = match () {
                () if node.revoked.is_some() => Standing::Revoked,
                () if node.expires <= now => Standing::Expired,
                () if !first => Standing::Replaced,
                () => Standing::Valid,
            };
            Listed { node, state }
        })
        .collect();
    all.reverse();
    all
}

fn table(all: &[Listed], now: u64) -> String {
    let mut text = String::from("NAME                  ROLES           STATE     EXPIRES     ADDRESS\n");
    let (mut seen, mut rows) = (BTreeSet::new(), Vec::new());
    // Of each name and roles the newest counts; the others are in the JSON.
    for Listed { node, state } in all.iter().rev() {
        if seen.insert((&node.name, &node.roles)) {
            rows.push((node, *state));
        }
    }
    rows.sort_by_key(|(node, _)| (&node.name, &node.roles));
    for (node, state) in rows {
        let days = node.expires.saturating_sub(now) / 86_400;
        let state = match state {
            Standing::Valid if days < 30 => "ends soon",
            Standing::Valid | Standing::Replaced => "valid",
            Standing::Expired => "expired",
            Standing::Revoked => "revoked",
        };
        let address = node.address.map_or_else(|| "-".to_owned(), |address| address.to_string());
        let (name, roles, expires) = (&node.name, node.roles.join(", "), date(node.expires));
        // Writing to a text cannot fail.
        let _ = writeln!(text, "{name:<20}  {roles:<14}  {state:<9} {expires}  {address}");
    }
    text
}

fn revoke(args: &NodeRevoke) -> Result<(), Failure> {
    let authority = Authority::open(&args.identity.authority()?)?;
    authority.revoke(&args.name)?;
    // This PC's own guests watch this folder. If its identity cannot be used, all others are told nevertheless.
    let folder = args.identity.path()?;
    let mut own = authority.hand_crl_to(&folder);
    let agents = agents(&authority.nodes()?, &args.tell);
    let tell = || tell_all(&authority, &agents, args.timeout.0);
    let mut told = tell()?;
    if told.iter().any(|told| matches!(told, Ok(Told::Behind))) {
        // There is a list now that is newer than what they keep.
        own = authority.hand_crl_to(&folder);
        told = tell()?;
    }
    let (name, crl) = (&args.name, authority.crl()?);
    let number = crl.number();
    let mut said =
        format!("Revoked: nobody who knows the list with number {number} speaks with `{name}` any more.\n");
    if Identity::load(&folder).is_ok_and(|identity| crl.revokes(identity.serial())) {
        said +=
            "That was this PC's own identity: `omega node invite` and `omega join` here make a new one.\n";
    }
    for ((address, name), told) in agents.iter().zip(told) {
        let who = name.as_ref().map_or_else(|| address.to_string(), |name| format!("{name} ({address})"));
        let what = match told {
            Ok(Told::Knows) => "knows it".to_owned(),
            Ok(Told::Behind) => "keeps another list; try again".to_owned(),
            Err(why) => format!("was not told: {why}; it learns it from the next console that connects"),
        };
        // Writing to a text cannot fail.
        let _ = writeln!(said, "{who} {what}");
    }
    show(&said)?;
    own.map_err(|why| Failure::failed(format!("This PC's own guests do not know it: {why}")))
}

/// What telling an agent showed.
enum Told {
    /// It knows the list.
    Knows,
    /// It knows one that the authority has forgotten, because its folder is an old copy.
    Behind,
}

/// Brings the authority's list to all `agents` at once.
fn tell_all(
    authority: &Authority,
    agents: &[(SocketAddr, Option<String>)],
    timeout: Duration,
) -> Result<Vec<Result<Told, String>>, Failure> {
    let messenger = authority.messenger()?;
    let security = Security::Tls(Reloading::in_memory(Arc::clone(&messenger)));
    let (security, crl) = (&security, messenger.crl());
    Ok(thread::scope(|scope| {
        let tell = |(address, name): &(SocketAddr, Option<String>)| {
            let (address, name) = (*address, name.clone());
            scope.spawn(move || push(address, name.as_deref(), security, crl, timeout))
        };
        let all: Vec<_> = agents.iter().map(tell).collect();
        let heard = all.into_iter().map(|told| {
            let list = told.join().unwrap_or_else(|_| Err("a fault here".to_owned()))?;
            // What is no list of this authority is that agent's affair.
            let behind = !list.is_empty() && authority.catch_up(&list).map_err(|why| why.to_string())?;
            Ok(if behind { Told::Behind } else { Told::Knows })
        });
        heard.collect()
    }))
}

/// Every agent whose address is known, with its name; and those that were named besides.
fn agents(nodes: &[Node], more: &[SocketAddr]) -> Vec<(SocketAddr, Option<String>)> {
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    let agent = |node: &&Node| node.revoked.is_none() && node.roles.iter().any(|role| role == "agent");
    let known = nodes.iter().rev().filter(agent);
    let known = known.filter_map(|node| Some((node.address?, Some(node.name.clone()))));
    for (address, name) in known.chain(more.iter().map(|address| (*address, None))) {
        if seen.insert(address) {
            found.push((address, name));
        }
    }
    found
}

/// Brings `crl` to the agent at `address`, which proves to be the node `name` if that is known; returns the list that
/// it keeps, if that is another.
fn push(
    address: SocketAddr,
    name: Option<&str>,
    security: &Security,
    crl: &Crl,
    timeout: Duration,
) -> Result<Vec<u8>, String> {
    let failed = |why: transport::blocking::Error| why.to_string();
    let mut client =
        Client::new(&address.to_string(), "omega node revoke", security, name).map_err(failed)?;
    let der = crl.der().to_vec();
    let reply =
        client.call(Class::Control, revocation::OPCODE, &[], der, MAX_CRL, timeout).map_err(failed)?;
    if reply.status != Status::OK {
        return Err(format!("it refused, status {}", reply.status.0));
    }
    match revocation::number(&reply.body) {
        // Without a list it says that it has this one.
        Some(number) if number == crl.number() || !reply.payload.is_empty() => Ok(reply.payload),
        Some(number) => Err(format!("it keeps list {number} and does not show it")),
        None => Err("its answer makes no sense".to_owned()),
    }
}

/// A time as people say it.
fn span(time: Duration) -> String {
    match time.as_secs() {
        seconds if seconds % 3600 == 0 => format!("{} h", seconds / 3600),
        seconds if seconds % 60 == 0 => format!("{} min", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The day, in UTC, of a time in seconds since 1970, as 2026-11-22.
#[must_use]
pub(super) fn date(seconds: u64) -> String {
    // Days are counted from 1 March 0000, so that the leap day is a year's last one.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, role: &str, expires: u64) -> Node {
        Node {
            name: name.into(),
            roles: vec![role.into()],
            serial: "01".into(),
            issued: 0,
            expires,
            revoked: None,
            address: Some(([10, 0, 0, 1], 7420).into()),
        }
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_795_392_000, "2026-11-23"),
            (4_107_542_400, "2100-03-01"),
            (4_107_542_399, "2100-02-28"),
        ] {
            assert_eq!(date(seconds), day, "{seconds}");
        }
    }

    #[test]
    fn the_newest_certificate_of_a_name_is_shown_and_how_it_stands() {
        let mut lost = node("lost", "agent", 1000 * 86_400);
        lost.revoked = Some(7);
        let nodes = vec![
            node("attic", "agent", 900 * 86_400),
            lost,
            node("attic", "agent", 1000 * 86_400),
            node("attic", "console", 20 * 86_400),
            node("old", "agent", 86_400),
        ];
        let all = judge(nodes, 86_400);
        let states: Vec<_> = all.iter().map(|listed| listed.state).collect();
        use Standing::{Expired, Replaced, Revoked, Valid};
        assert_eq!(states, [Replaced, Revoked, Valid, Valid, Expired]);
        let text = table(&all, 86_400);
        let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|row| row.split_whitespace().collect()).collect();
        let rows: Vec<_> = rows.iter().map(|row| row[..3].join(" ")).collect();
        assert_eq!(
            rows,
            ["attic agent valid", "attic console ends", "lost agent revoked", "old agent expired"]
        );
    }

    #[test]
    fn a_name_that_is_invited_again_is_told_of_while_a_certificate_of_it_is_good() {
        let mut attic = node("attic", "agent", 9);
        assert!(taken("attic", &[attic.clone()], 8).expect("told").contains("omega node revoke attic"));
        assert_eq!(taken("cellar", &[attic.clone()], 8), None);
        assert_eq!(taken("attic", &[attic.clone()], 9), None, "it has ended");
        attic.revoked = Some(7);
        assert_eq!(taken("attic", &[attic], 8), None);
    }

    #[test]
    fn every_agent_that_is_not_revoked_is_told_once() {
        let mut lost = node("lost", "agent", 9);
        (lost.revoked, lost.address) = (Some(7), Some(([10, 0, 0, 2], 7420).into()));
        let nodes =
            [node("old-name", "agent", 9), lost, node("attic", "agent", 9), node("desk", "console", 9)];
        let more = [([10, 0, 0, 1], 7420).into(), ([10, 0, 0, 3], 7420).into()];
        let found = agents(&nodes, &more);
        assert_eq!(found, [(more[0], Some("attic".to_owned())), (more[1], None)]);
    }
}
