//! Spans that join one request in the logs of both sides.
//!
//! A request's name is `SESSION-ID`: the first 12 hexadecimal digits of the session's identity, which both
//! sides know, and the request's number in it. All of the session's identity is not shown: whoever knows it
//! may take an unauthenticated session over.

use std::fmt;
use std::time::Duration;

use tracing::Span;

use crate::metrics::{Operations, Recorder};
use crate::server::Request;
use crate::wire::{Header, Status};

/// The target of everything that is logged of single requests.
pub(crate) const TARGET: &str = "transport::request";

/// A request's name in the logs of both sides.
struct Name {
    session: u128,
    id: u64,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}-{}", self.session >> 80, self.id)
    }
}

fn operation(recorder: Option<&Recorder>, opcode: u16) -> &'static str {
    recorder.map_or(Operations::default(), Recorder::operations).name(opcode)
}

/// The span of a request, with the same text on both sides.
macro_rules! span {
    ($session:expr, $id:expr, $class:expr, $opcode:expr, $recorder:expr) => {
        tracing::trace_span!(
            target: "transport::request",
            "request",
            id = %Name { session: $session, id: $id },
            operation = operation($recorder, $opcode),
            opcode = format_args!("{:#06x}", $opcode),
            class = $class.name(),
        )
    };
}

/// The asking side hands a request to the network.
pub(crate) fn sent(
    span: &mut Span,
    session: u128,
    header: &Header,
    recorder: Option<&Recorder>,
    again: bool,
) {
    if !tracing::enabled!(target: TARGET, tracing::Level::TRACE) {
        return;
    }
    // In a new session it has another name.
    *span = span!(session, header.id, header.class, header.code, recorder);
    span.in_scope(|| tracing::trace!(target: TARGET, again, answer_len = header.answer_len, "Sent"));
}

/// The answering side has all of a request.
pub(crate) fn received(session: u128, request: &Request, recorder: Option<&Recorder>) -> Span {
    if !tracing::enabled!(target: TARGET, tracing::Level::TRACE) {
        return Span::none();
    }
    let span = span!(session, request.id, request.class, request.opcode, recorder);
    span.in_scope(|| tracing::trace!(target: TARGET, payload = request.payload.len(), "Received"));
    span
}

/// Either side: there is an answer.
pub(crate) fn answered(span: &Span, Status(status): Status, took: Duration) {
    if !span.is_none() {
        span.in_scope(|| tracing::trace!(target: TARGET, status, ?took, "Answered"));
    }
}
