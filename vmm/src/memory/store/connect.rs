//! The first meeting with the helpers, before the guest starts: everything that cannot work is said here, in one
//! line, and what was taken until then is given back.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::blocking::{self, Client};
use transport::wire::{Class, Status};

use super::compress::Compress;
use super::control::{Control, Mailbox};
use super::core::{Core, Settings};
use super::file::{self, SwapFile};
use super::health::{Counters, Health};
use super::placement::{self, Keepers};
use super::protocol::{Lease, Malformed, Refusal, Take, Taken, opcode, status};
use super::remote::{Helper, Holding, Remote, release};
use super::room::{self, Need, least, suffices};
use super::stores::{Link, Stores};
use crate::memory::fault::{PAGE, Shards};

/// How long the first answer may take: of an agent that is not there nothing is gained by waiting longer.
const FIRST_ANSWER: Duration = Duration::from_secs(15);

/// So many pages of a guest's helpers at most are no handler's.
const ROUNDED: u64 = 64 * 4;

/// Of so many helpers, each can have pages of every piece. With more, all of RAM must have room in whole pieces.
pub const MOST_THAT_HELP: usize = 6;

/// What keeps the guest's memory when a helper is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// Nothing: the guest waits until the helper is back, and ends if what it kept is gone.
    #[default]
    None,
    /// Each page is on two helpers.
    Mirror,
    /// Each page is in a local file too.
    LocalDisk,
}

/// What the stores are for.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The guest's name, for the helpers' owners.
    pub guest: String,
    /// The guest's and this PC's name: shown to helpers, not trusted.
    pub name: String,
    /// The guest's RAM and who handles which part of it.
    pub shards: Shards,
    /// So many bytes of it may be in this PC's memory, and then need no room on helpers. 0: all of it has its room there.
    pub local: u64,
    /// What keeps the guest's memory when a helper is lost.
    pub on_loss: OnLoss,
    /// Where the local file is made; only for [`OnLoss::LocalDisk`], which needs it.
    pub swap_file: Option<PathBuf>,
    /// Whether pages are packed on their way.
    pub compress: Compress,
    /// A helper that is away for longer does not count any more, where what it keeps is elsewhere too.
    pub patience: Duration,
    /// A connection that carried nothing for this long, though pinged, is dead.
    pub dead_after: Duration,
    /// A fetch that takes longer is asked of another copy too.
    pub hedge: Duration,
    /// How long each helper may take to answer at first.
    pub timeout: Duration,
}

impl Terms {
    /// With the usual patience: 10 s for a helper, 5 s for a connection, 250 ms for a fetch, 30 s at first.
    #[must_use]
    pub fn new(guest: &str, name: &str, shards: Shards, on_loss: OnLoss) -> Self {
        Self {
            guest: guest.to_owned(),
            name: name.to_owned(),
            shards,
            local: 0,
            on_loss,
            swap_file: None,
            compress: Compress::Auto,
            patience: Duration::from_secs(10),
            dead_after: Duration::from_secs(5),
            hedge: Duration::from_millis(250),
            timeout: Duration::from_secs(30),
        }
    }

    fn need(&self, shard: u32) -> Need {
        room::need(&self.shards, shard, self.local / PAGE as u64)
    }

    /// How many bytes helpers with room for so many pages lack.
    pub(super) fn missing(&self, rooms: &[u64]) -> u64 {
        let pieces = self.shards.pieces();
        let (all, copies) = (pieces.pages(), u64::from(self.copies()));
        if rooms.iter().map(|room| (*room).min(all)).sum::<u64>() >= all * copies {
            return 0;
        }
        // A few pages are lost to dividing the room among handlers.
        let need = least(all * PAGE as u64, self.local) / PAGE as u64;
        let copies = self.copies() as usize;
        if suffices(rooms.iter().copied(), copies, need.saturating_sub(ROUNDED)) {
            return 0;
        }
        room::missing(rooms, copies, need) * PAGE as u64
    }

    fn copies(&self) -> u32 {
        if self.on_loss == OnLoss::Mirror { 2 } else { 1 }
    }
}

/// The memory asked for cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The sizes do not suffice.
    #[error(
        "The helpers' sizes are too small: {need} MiB must have room on {on}: the guest's RAM less its `local` part, and \
         a little for pages on their way; the sizes add up to {have} MiB"
    )]
    TooSmall {
        /// Mebibytes for one copy of everything.
        need: u64,
        /// How many helpers each page is on.
        on: &'static str,
        /// Mebibytes that the helpers lend.
        have: u64,
    },
    /// A mirror has two sides.
    #[error("`on_loss = \"mirror\"` needs at least two helpers; add a `[[memory.helper]]`")]
    OneHelper,
    /// There is nobody.
    #[error("The guest's memory is larger than its `local` part, and no `[[memory.helper]]` has the rest")]
    NoHelper,
    /// More than can be numbered.
    #[error("A guest has at most 64 helpers")]
    TooMany,
    /// Local disk without a file.
    #[error("`on_loss = \"local-disk\"` needs `swap_file`, the path of a file that does not exist yet")]
    NoFile,
    /// Nobody answers at the agent's address.
    #[error(
        "The agent at {agent}, which is to lend memory, cannot be reached: {source}; is omega-agent running there \
         and the address right?"
    )]
    Unreachable {
        /// The address.
        agent: String,
        /// What was tried and for how long.
        source: blocking::Error,
    },
    /// The agent lends none, or not so much.
    #[error("The agent at {agent} does not lend {need} MiB of memory: {why}")]
    Refused {
        /// The address.
        agent: String,
        /// Mebibytes.
        need: u64,
        /// Why not.
        why: String,
    },
    /// The peer does not speak the memory protocol.
    #[error("The peer at {agent} is no agent that this Omega understands: {source}")]
    Protocol {
        /// The address.
        agent: String,
        /// What was wrong.
        source: Malformed,
    },
    /// The local file.
    #[error(transparent)]
    File(#[from] file::Error),
    /// There is no thread or descriptor to be had, or no randomness.
    #[error("The memory of helpers cannot be used: {0}")]
    System(#[from] std::io::Error),
}

/// Memory on other PCs.
pub struct Connected {
    /// One for each handler, in order.
    pub stores: Vec<Stores>,
    /// To empty helpers and add some, while the guest runs.
    pub control: Arc<Control>,
    /// How the helpers are.
    pub health: Arc<Health>,
}

/// Deals `pages` among handlers as evenly as it goes.
fn split(pages: u64, handlers: usize) -> Vec<u64> {
    let handlers = handlers.max(1) as u64;
    (0..handlers).map(|handler| (pages + handlers - 1 - handler) / handlers).collect()
}

/// How many pages of each helper each handler may use: those of the pieces that it is dealt, and a part of what is left
/// over; or where not all of RAM has room, a part of it as large as the handler's part of the whole need.
fn rooms(sizes: &[u64], dealt: &[Keepers], terms: &Terms) -> Vec<Vec<u64>> {
    let handlers = terms.shards.count() as usize;
    let each = u64::from(terms.shards.pieces().each());
    let mut rooms = vec![vec![0; handlers]; sizes.len()];
    for (piece, keepers) in dealt.iter().enumerate() {
        keepers.iter().for_each(|keeper| rooms[usize::from(*keeper)][piece % handlers] += each);
    }
    let whole = rooms.iter().zip(sizes).all(|(rooms, size)| rooms.iter().sum::<u64>() <= *size);
    for (rooms, size) in rooms.iter_mut().zip(sizes) {
        if whole {
            let spare = split(size.saturating_sub(rooms.iter().sum()), handlers);
            rooms.iter_mut().zip(spare).for_each(|(room, spare)| *room += spare);
        } else {
            *rooms = by_need(*size, terms);
        }
    }
    rooms
}

/// Deals `pages` among handlers by what each needs.
pub(super) fn by_need(pages: u64, terms: &Terms) -> Vec<u64> {
    let needs: Vec<u64> = (0..terms.shards.count()).map(|shard| terms.need(shard).pages).collect();
    let all: u128 = needs.iter().map(|need| u128::from(*need)).sum::<u128>().max(1);
    needs.iter().map(|need| (u128::from(pages) * u128::from(*need) / all) as u64).collect()
}

/// Takes the memory that a guest needs from its helpers, before it starts. Blocks until each has answered. Opens
/// files and starts threads: not for a confined thread.
///
/// # Errors
/// Each [`ConnectError`]: one line that says what is wrong and where.
pub fn connect(helpers: &[Helper], terms: &Terms) -> Result<Connected, ConnectError> {
    let shards = terms.shards;
    let (pieces, handlers) = (*shards.pieces(), shards.count() as usize);
    let sizes: Vec<u64> = helpers.iter().map(Helper::pages).collect();
    let dealt = plan(&sizes, terms)?;
    let local = terms.on_loss == OnLoss::LocalDisk;
    let file = match (&terms.swap_file, local) {
        (Some(path), true) => Some((path, file::make(path, pieces.pages() * PAGE as u64)?)),
        (None, true) => return Err(ConnectError::NoFile),
        (_, false) => None,
    };
    let holders = (0..handlers).map(|_| random()).collect::<Result<Vec<u128>, _>>()?;
    let rooms = rooms(&sizes, &dealt, terms);
    let remotes = helpers.iter().zip(&rooms).map(|(helper, room)| take(helper, terms, &holders, room));
    // What was taken is given back if another helper refuses: by dropping it.
    let remotes = remotes.collect::<Result<Vec<Vec<Remote>>, _>>()?;
    let health = Arc::new(Health::new(handlers)?);
    let (copies, patience, hedge) = (terms.copies() as usize, terms.patience, terms.hedge);
    let settings = |shard| Settings { copies, local, patience, hedge, need: terms.need(shard) };
    let mailboxes = (0..handlers).map(|_| Mailbox::new().map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    let now = Instant::now();
    let core = |shard| Core::new(shards, shard, settings(shard), Arc::clone(&health), now);
    let mut cores: Vec<(Core, Vec<Link>)> =
        (0..shards.count()).map(|shard| (core(shard), Vec::new())).collect();
    for ((remotes, helper), room) in remotes.into_iter().zip(helpers).zip(&rooms) {
        let counters: Vec<Arc<Counters>> = remotes.iter().map(Remote::counters).collect();
        let metrics = remotes.iter().map(|remote| Some(remote.metrics()));
        health.add(&helper.agent, counters.iter().cloned().zip(metrics).collect());
        for ((((core, links), remote), counters), room) in
            cores.iter_mut().zip(remotes).zip(counters).zip(room)
        {
            core.add(&helper.agent, counters, *room, false, now);
            links.push(Link::Helper(Box::new(remote)));
        }
    }
    if let Some((path, file)) = file {
        let counters: Vec<Arc<Counters>> = cores.iter().map(|_| Arc::default()).collect();
        let name = path.display().to_string();
        health.add(&name, counters.iter().cloned().map(|c| (c, None)).collect());
        for ((core, links), counters) in cores.iter_mut().zip(counters) {
            core.add(&name, counters, pieces.pages(), true, now);
            links.push(Link::File(Box::new(SwapFile::new(file.try_clone()?))));
        }
    }
    let stores = cores.into_iter().zip(&mailboxes).map(|((mut core, links), mailbox)| {
        core.deal(&dealt);
        Stores::new(core, links, Arc::clone(mailbox))
    });
    let stores = stores.collect();
    let control = Arc::new(Control::new(terms.clone(), Arc::clone(&health), mailboxes, holders));
    Ok(Connected { stores, control, health })
}

/// Who keeps which piece of helpers that lend so many pages; or why that cannot be.
fn plan(sizes: &[u64], terms: &Terms) -> Result<Vec<Keepers>, ConnectError> {
    let (pieces, copies) = (terms.shards.pieces(), terms.copies());
    match sizes.len() {
        0 => return Err(ConnectError::NoHelper),
        1 if copies == 2 => return Err(ConnectError::OneHelper),
        65.. => return Err(ConnectError::TooMany),
        _ => {}
    }
    let page = PAGE as u64;
    let need = least(pieces.pages() * page, terms.local).div_ceil(page);
    let too_small = || {
        let on = if copies == 2 { "two helpers each" } else { "the helpers" };
        let have = (sizes.iter().sum::<u64>() * page) >> 20;
        ConnectError::TooSmall { need: (need * page).div_ceil(1 << 20), on, have }
    };
    let each = u64::from(pieces.each());
    let whole: Vec<u32> = sizes.iter().map(|pages| (pages / each).min(1 << 31) as u32).collect();
    let most = |pieces: u32| whole.iter().map(move |room| u64::from((*room).min(pieces))).sum::<u64>();
    let all = most(pieces.count()) >= u64::from(pieces.count()) * u64::from(copies);
    // What a piece can have no whole place in, page by page it can.
    let helps = sizes.len() <= MOST_THAT_HELP && suffices(sizes.iter().copied(), copies as usize, need);
    if !all && !helps {
        return Err(too_small());
    }
    let shares =
        if all { whole } else { sizes.iter().map(|pages| (pages / 64).clamp(1, 1 << 31) as u32).collect() };
    placement::deal_by_handler(pieces.count(), terms.shards.count(), &shares, copies).ok_or_else(too_small)
}

/// A number that nobody guesses: who holds a lease.
pub(crate) fn random() -> std::io::Result<u128> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(u128::from_le_bytes(bytes))
}

/// Takes a helper's memory: a lease for each handler, with room for so many pages.
pub(super) fn take(
    helper: &Helper,
    terms: &Terms,
    holders: &[u128],
    rooms: &[u64],
) -> Result<Vec<Remote>, ConnectError> {
    let agent = || helper.agent.clone();
    let unreachable = |source| ConnectError::Unreachable { agent: agent(), source };
    let mut client = helper.client(&terms.name).map_err(unreachable)?;
    let mut helper = helper.clone();
    let mut remotes = Vec::new();
    for (holder, room) in holders.iter().zip(rooms) {
        let pages = terms.shards.pieces().pages();
        // At least one: a lease of none is none, and one that is there can be given a larger quota.
        let quota = (*room).clamp(1, pages);
        let take = Take { holder: *holder, expected: 0, pages, quota, guest: terms.guest.clone() };
        let taken = lease(&mut client, &helper, &take, terms.timeout)?;
        // The address may lead elsewhere later, and a helper is trusted with the guest's memory: it stays this one.
        helper.node = helper.node.or_else(|| client.proven().map(|peer| peer.name.clone()));
        let lease = Lease { epoch: taken.epoch, holder: *holder };
        let holding = Holding { take, taken: Some(taken) };
        let remote =
            Remote::new(helper.clone(), terms.name.clone(), terms.dead_after, terms.compress, holding);
        remotes.push(remote.inspect_err(|_| release(&helper, &terms.name, lease))?);
    }
    Ok(remotes)
}

/// Takes one lease. Memory that is being cleared after another guest is waited for.
fn lease(
    client: &mut Client,
    helper: &Helper,
    take: &Take,
    timeout: Duration,
) -> Result<Taken, ConnectError> {
    let agent = || helper.agent.clone();
    let until = Instant::now() + timeout;
    let body = take.encode();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let within = left.min(FIRST_ANSWER).max(Duration::from_millis(100));
        let reply = client.call(Class::Control, opcode::LEASE, &body, Vec::new(), 0, within);
        let reply = reply.map_err(|source| ConnectError::Unreachable { agent: agent(), source })?;
        if reply.status == Status::OK {
            return Taken::decode(&reply.body)
                .map_err(|source| ConnectError::Protocol { agent: agent(), source });
        }
        let refusal = Refusal::decode(&reply.body);
        let wait = refusal.as_ref().map_or(Duration::ZERO, |refusal| refusal.wait);
        let passes = matches!(reply.status, status::NO_MEMORY | status::BUSY);
        if passes && !wait.is_zero() && wait <= left {
            std::thread::sleep(wait.min(Duration::from_secs(1)));
            continue;
        }
        let Status(code) = reply.status;
        let why =
            refusal.map_or_else(|_| format!("it answered with status {code:#06x}"), |refusal| refusal.text);
        return Err(ConnectError::Refused { agent: agent(), need: helper.size >> 20, why });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fault::Pieces;
    use crate::units::Bytes;

    fn terms(ram: u64, on_loss: OnLoss) -> Terms {
        Terms::new("g", "g on pc1", Shards::new(Pieces::new(Bytes(ram)), 3), on_loss)
    }

    const PIECE: u64 = 4096;

    #[test]
    fn sizes_that_do_not_suffice_are_named_with_what_is_needed() {
        let error = |sizes: &[u64], on_loss| {
            let sizes: Vec<u64> = sizes.iter().map(|pieces| pieces * PIECE).collect();
            plan(&sizes, &terms(1 << 30, on_loss)).err().map(|e| e.to_string())
        };
        assert_eq!(error(&[32, 32], OnLoss::None), None);
        let none = error(&[32, 31], OnLoss::None).expect("one piece is missing");
        assert!(none.contains("1024 MiB") && none.contains("1008 MiB"), "{none}");
        let mirror = error(&[100, 63], OnLoss::Mirror).expect("the second copy has no room");
        assert!(mirror.contains("two helpers"), "{mirror}");
        assert!(error(&[200], OnLoss::Mirror).is_some_and(|e| e.contains("at least two helpers")));
        assert!(error(&[], OnLoss::None).is_some());
        assert!(error(&[64], OnLoss::LocalDisk).is_none());
    }

    #[test]
    fn what_may_be_here_needs_no_room_on_helpers() {
        let local = Terms { local: 256 << 20, ..terms(1 << 30, OnLoss::None) };
        let need = least(1 << 30, 256 << 20) / PAGE as u64;
        assert_eq!(need, (768 + 64) << 8);
        assert!(plan(&[need], &local).is_ok() && plan(&[need - 1], &local).is_err());
        assert!(plan(&[need / 3, need - need / 3], &local).is_ok());
        let mirror = Terms { on_loss: OnLoss::Mirror, ..local };
        assert!(plan(&[need, need], &mirror).is_ok() && plan(&[need, need - 1], &mirror).is_err());
        assert!(plan(&[need * 2 / 3 + 1; 3], &mirror).is_err(), "two may be full and the third empty");
        assert!(plan(&[need; 3], &mirror).is_ok());
    }

    #[test]
    fn every_handler_has_room_for_what_it_needs_and_no_helper_lends_more_than_its_size() {
        for sizes in [vec![64], vec![40, 50], vec![13, 64, 7]] {
            let sizes: Vec<u64> = sizes.into_iter().map(|pieces| pieces * PIECE).collect();
            let terms = terms(1 << 30, OnLoss::None);
            let dealt = plan(&sizes, &terms).expect("there is room");
            let rooms = rooms(&sizes, &dealt, &terms);
            for (helper, (rooms, size)) in rooms.iter().zip(&sizes).enumerate() {
                assert_eq!(rooms.iter().sum::<u64>(), *size);
                for (handler, room) in rooms.iter().enumerate() {
                    let mine = dealt.iter().skip(handler).step_by(3);
                    let kept = mine.filter(|keepers| usize::from(keepers[0]) == helper).count() as u64;
                    assert!(kept * PIECE <= *room);
                }
            }
        }
        assert_eq!(split(10, 4), [3, 3, 2, 2]);
        for sizes in [vec![1.0], vec![0.5, 0.3, 0.2]] {
            let terms = Terms { local: 300 << 20, ..terms(1 << 30, OnLoss::None) };
            let need = least(1 << 30, terms.local) / PAGE as u64;
            let sizes: Vec<u64> = sizes.into_iter().map(|part| (need as f64 * part) as u64 + 1).collect();
            let rooms = rooms(&sizes, &plan(&sizes, &terms).expect("there is room"), &terms);
            for handler in 0..3 {
                let has: u64 = rooms.iter().map(|rooms| rooms[handler]).sum();
                let Need { pages, slack } = terms.need(handler as u32);
                assert!(has + 8 > pages && slack > 1000, "{has} {pages} {slack}");
            }
            assert!(rooms.iter().zip(&sizes).all(|(rooms, size)| rooms.iter().sum::<u64>() <= *size));
        }
    }
}
