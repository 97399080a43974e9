//! What this program does inside a lab PC: the parts of a measurement that need another kernel than the host's, or
//! two PCs.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Subcommand;
use transport::identity::Security;

use crate::paged::{Paged, Setting};
use crate::peer::swap::{self, Swap};
use crate::region::{Anonymous, PAGE, Region};
use crate::stats::rate;
use crate::zipf::Zipf;

/// The parts.
#[derive(Subcommand)]
pub enum Inside {
    /// Serve memory as a network block device.
    SwapServer {
        /// Where to listen.
        address: String,
        /// How many pages.
        pages: u64,
    },
    /// Make zipfian accesses to memory of which a part is here, the rest swapped to a network block device.
    ZipfSwap(Zipfian),
    /// The same, the rest lent by an agent.
    ZipfPaged(Zipfian),
}

/// Zipfian accesses.
#[derive(clap::Args)]
pub struct Zipfian {
    /// Of the server or agent.
    address: String,
    /// How many pages are used.
    pages: u64,
    /// How many fit.
    local: u64,
    /// For how long accesses are measured.
    seconds: u64,
}

impl Zipfian {
    fn accesses(&self) -> Zipf {
        Zipf::new(self.pages, 1.0, 4, 1)
    }
}

/// What the measuring parts print before the accesses per second.
pub const RESULT: &str = "accesses per second:";

/// What a process that swaps may have besides its pages: what it takes before the limit is set is not counted, so this
/// is for its page tables and what else the kernel keeps for it.
fn besides(pages: u64) -> u64 {
    pages * 8 + (1 << 20)
}

/// Does it.
///
/// # Errors
/// Something is missing here.
pub fn run(what: &Inside) -> Result<()> {
    match what {
        Inside::SwapServer { address, pages } => {
            let listener = TcpListener::bind(address)?;
            println!("listening");
            swap::serve(&listener, *pages as usize * PAGE)
        }
        Inside::ZipfSwap(zipfian) => {
            let size = zipfian.pages * PAGE as u64;
            let _swap = Swap::on(&zipfian.address, size * 2)?;
            let accesses = zipfian.accesses();
            swap::limit(zipfian.local * PAGE as u64 + besides(zipfian.pages))?;
            let memory = Anonymous::new(zipfian.pages)?;
            measure(memory.region(), zipfian, accesses);
            Ok(())
        }
        Inside::ZipfPaged(zipfian) => {
            let Zipfian { address, pages, local, .. } = zipfian;
            let setting = Setting { pages: *pages, local: *local, handlers: 1, security: Security::Plain };
            let paged = Paged::connect(&setting, address)?;
            measure(paged.region(), zipfian, zipfian.accesses());
            eprintln!("{:?}", paged.counters());
            Ok(())
        }
    }
}

fn measure(region: &Region, zipfian: &Zipfian, mut zipf: Zipf) {
    const BATCH: u64 = 100;
    (0..region.pages()).for_each(|page| region.fill(page));
    zipf.run(region, region.pages()); // until what is used most is here
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(zipfian.seconds) {
        zipf.run(region, BATCH);
        count += BATCH;
    }
    println!("{RESULT} {:.1}", rate(count, start.elapsed()));
}
