//! The agent's numbers for Prometheus: the text format over the least of HTTP/1.1 that a scraper needs, on a
//! port of its own and from a thread of its own. The data path is never waited for.

mod exposition;
mod http;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::Error;
use crate::serve::Agent;

pub(crate) use exposition::Facts;

/// So many requests at once: whoever is slow keeps Prometheus out only with as many connections.
const THREADS: usize = 3;

/// Serves the agent's numbers at `address` as long as the process lives.
///
/// # Errors
/// The address cannot be listened on, or there is no thread to be had.
pub(crate) fn start(address: SocketAddr, agent: &Arc<Agent>) -> Result<(), Error> {
    let failed = |source| Error::Metrics { address, source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    let bound = listener.local_addr().unwrap_or(address);
    if bound.ip().is_loopback() {
        tracing::info!(address = %bound, "Serving metrics");
    } else {
        tracing::warn!(
            address = %bound,
            "Serving metrics to whoever reaches this address: plain HTTP, which shows peers' and operations' names"
        );
    }
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (agent, name) = (Arc::clone(agent), agent.name());
    let text = move || {
        let (name, connections) = (agent.name(), agent.connections());
        let (memory, leases) = (agent.memory.totals(), agent.memory.sights());
        exposition::text(&Facts { name, started, connections, memory, leases }, &agent.metrics.snapshot())
    };
    answer_on(&Arc::new(listener), &name, text).map_err(failed)
}

/// Answers requests for this PC or the agent `name` on [`THREADS`] threads.
fn answer_on(
    listener: &Arc<TcpListener>,
    name: &str,
    text: impl Fn() -> String + Clone + Send + 'static,
) -> io::Result<()> {
    for _ in 0..THREADS {
        let (listener, name, text) = (Arc::clone(listener), name.to_owned(), text.clone());
        let body = move || http::serve(&listener, &name, text);
        thread::Builder::new().name("metrics".to_owned()).spawn(body)?;
    }
    Ok(())
}
