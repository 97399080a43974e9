//! Measures the way to an agent: round trips, jitter and bandwidth by class, and what carries them.

mod statistics;
mod way;

use std::time::Duration;

use serde::Serialize;
use transport::Carrier;
use transport::identity::Security;
use transport::wire::{Class, MAX_PAYLOAD};

pub use statistics::RoundTrips;
use way::{Direction, Way};

/// The version of [`Report`]'s JSON.
const VERSION: u32 = 1;
/// Bytes of one request that measures bandwidth.
const BLOCK: usize = 256 << 10;
/// So many of them are in flight: more than any way holds that a page crosses in a millisecond.
const DEPTH: usize = 8;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// `host:port`.
    pub address: String,
    /// Who asks, for the agent's log.
    pub name: String,
    /// How the connection is protected.
    pub security: Security,
    /// The node that the agent must prove to be; `None`: any agent of the household.
    pub node: Option<String>,
    /// Which classes, in this order.
    pub classes: Vec<Class>,
    /// Round trips of each class.
    pub count: u32,
    /// Payload bytes each way, at most [`MAX_PAYLOAD`].
    pub size: usize,
    /// The pause between two round trips.
    pub pause: Duration,
    /// How long bandwidth is measured for each class and direction; zero: not at all.
    pub bandwidth: Duration,
    /// How long a connection or an answer may take.
    pub timeout: Duration,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    version: u32,
    /// `host:port`.
    pub address: String,
    /// How the agent calls itself.
    pub name: String,
    /// The name that it proved by its certificate; none on a plain connection.
    pub proven: Option<String>,
    /// What carries the connection at the end: `tcp`, `kernel-tls`, `tls-records` or `rdma`.
    pub carrier: String,
    /// Why it is not RDMA, if that was tried.
    pub why_not_rdma: Option<String>,
    /// Connections that were lost meanwhile.
    pub losses: u32,
    /// By class; not all that were wanted, if it was interrupted.
    pub classes: Vec<Measured>,
}

/// What was measured of one class.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The class.
    pub class: Class,
    /// Payload bytes each way.
    pub size: usize,
    /// Its round trips.
    #[serde(flatten)]
    pub round_trips: RoundTrips,
    /// Payload bytes per second to the agent.
    pub up_bytes_per_s: Option<f64>,
    /// Payload bytes per second from the agent.
    pub down_bytes_per_s: Option<f64>,
    /// What carried it at its end.
    pub carrier: String,
}

impl Report {
    /// Whether everything that was sent was answered, and something was.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let trips = || self.classes.iter().map(|measured| &measured.round_trips);
        trips().any(|trips| trips.answered > 0) && trips().all(|trips| trips.answered == trips.sent)
    }
}

/// Nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection within the time.
    #[error("{address} does not answer within {timeout:.1?}: {reason}")]
    Unreachable {
        /// Whom we asked.
        address: String,
        /// How long we waited.
        timeout: Duration,
        /// What last happened.
        reason: String,
    },
    /// The agent refused the echo.
    #[error("{address} does not echo: {why}")]
    Refused {
        /// Whom we asked.
        address: String,
        /// Why.
        why: String,
    },
    /// It was interrupted before there was a connection.
    #[error("Interrupted before {0} answered")]
    Interrupted(String),
    /// The kernel refuses io_uring, or there is no thread to be had.
    #[error("The kernel does not allow it: {0}")]
    System(#[from] std::io::Error),
}

/// Measures the way to an agent, until that is done or `stop` says so, which is asked often.
///
/// # Errors
/// There is no agent that answers.
pub fn run(options: &Options, stop: &dyn Fn() -> bool) -> Result<Report, Error> {
    let mut way = Way::open(options, stop)?;
    let mut classes = Vec::new();
    for class in &options.classes {
        let (measured, interrupted) = measure(&mut way, options, *class)?;
        classes.push(measured);
        if interrupted {
            break;
        }
    }
    Ok(Report {
        version: VERSION,
        address: options.address.clone(),
        name: way.name.clone(),
        proven: way.proven.clone(),
        carrier: way.carrier.to_string(),
        why_not_rdma: (way.carrier != Carrier::Rdma).then(|| way.why_not_rdma.clone()).flatten(),
        losses: way.losses,
        classes,
    })
}

/// One class, and whether it was interrupted.
fn measure(way: &mut Way<'_>, options: &Options, class: Class) -> Result<(Measured, bool), Error> {
    let size = options.size.min(MAX_PAYLOAD);
    let (mut sent, mut times, mut interrupted) = (0, Vec::new(), false);
    for at in 0..options.count {
        if at > 0 && way.pause(options.pause)? {
            interrupted = true;
            break;
        }
        sent += 1;
        match way.round_trip(class, size)? {
            way::Trip::Answered(took) => times.push(took),
            way::Trip::Lost => {}
            way::Trip::Interrupted => {
                sent -= 1;
                interrupted = true;
                break;
            }
        }
    }
    let mut bandwidth = |direction| -> Result<Option<f64>, Error> {
        if interrupted || options.bandwidth.is_zero() || times.is_empty() {
            return Ok(None);
        }
        let measured = way.bandwidth(class, direction, options.bandwidth)?;
        interrupted |= measured.is_none();
        Ok(measured)
    };
    let (up, down) = (bandwidth(Direction::Up)?, bandwidth(Direction::Down)?);
    let measured = Measured {
        class,
        size,
        round_trips: RoundTrips::of(sent, &times),
        up_bytes_per_s: up,
        down_bytes_per_s: down,
        carrier: way.carrier.to_string(),
    };
    Ok((measured, interrupted))
}
