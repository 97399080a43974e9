//! `GET /metrics`, and a clear answer to everything else.
//!
//! One request a connection and few connections at a time: whoever is slow is cut off, so the next one's wait
//! has a bound, and so has the memory. The name that is asked for must be an address, `localhost` or this agent's:
//! a page in a browser on this network could otherwise read the numbers under a name of its own that it lets point
//! here. See RFC 9112 for what is read and written here.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// The longest head of a request.
const HEAD: usize = 8 << 10;
/// How long a request may take to come.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// How long an answer may take to go.
const WRITE_WITHIN: Duration = Duration::from_secs(5);
/// The format that the body has.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a request is answered with.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The metrics, or only what a `GET` would be headed by.
    Metrics { head_only: bool },
    /// Status line, and a word for people.
    Refused(&'static str, &'static str),
}

/// Answers requests until the process ends.
pub(super) fn serve(listener: &TcpListener, own: &str, text: impl Fn() -> String) {
    loop {
        let result = listener.accept().and_then(|(socket, _)| answer(socket, own, &text));
        match result {
            Ok(()) => {}
            // A peer that is slow or gone is its own affair.
            Err(why) if is_peers(&why) => tracing::debug!(%why, "A metrics request was not answered"),
            Err(why) => {
                // Out of descriptors; the agent goes on, and so does this after a while.
                tracing::debug!(%why, "A metrics connection could not be taken");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn is_peers(why: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        why.kind(),
        Kind::WouldBlock
            | Kind::TimedOut
            | Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::UnexpectedEof
            | Kind::WriteZero
            | Kind::Interrupted
            | Kind::NotConnected
    )
}

fn answer(mut socket: TcpStream, own: &str, text: &impl Fn() -> String) -> io::Result<()> {
    let head = read_head(&mut socket)?;
    let verdict = judge(head.as_deref(), own);
    let (status, format, body, head_only) = match verdict {
        Verdict::Metrics { head_only } => ("200 OK", FORMAT, text(), head_only),
        Verdict::Refused(status, why) => (status, "text/plain; charset=utf-8", format!("{why}\n"), false),
    };
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {format}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        body.len()
    );
    if !head_only {
        answer.push_str(&body);
    }
    write_all(&mut socket, answer.as_bytes())
}

/// The head of a request; `None` if it is too long.
fn read_head(socket: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let until = Instant::now() + READ_WITHIN;
    let mut head = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let mut some = [0; 1024];
        let n = socket.read(&mut some)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The end may lie across two pieces.
        let from = head.len().saturating_sub(3);
        head.extend_from_slice(&some[..n]);
        if let Some(end) = head[from..].windows(4).position(|four| four == b"\r\n\r\n") {
            head.truncate(from + end);
            return Ok(Some(head));
        }
        if head.len() > HEAD {
            return Ok(None);
        }
    }
}

fn write_all(socket: &mut TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    let until = Instant::now() + WRITE_WITHIN;
    while !bytes.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_write_timeout(Some(left))?;
        match socket.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
    Ok(())
}

/// What the request with this head gets from the agent `own`. Of the head's fields only `Host` means something
/// here: there is no body to a `GET`, and one format.
fn judge(head: Option<&[u8]>, own: &str) -> Verdict {
    let Some(head) = head else {
        return Verdict::Refused("431 Request Header Fields Too Large", "The request's head is too long");
    };
    let malformed = Verdict::Refused("400 Bad Request", "This is no HTTP request");
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line) else { return malformed };
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return malformed;
    };
    if !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return match version.starts_with("HTTP/") {
            true => Verdict::Refused("505 HTTP Version Not Supported", "HTTP/1.1 is spoken here"),
            false => malformed,
        };
    }
    match hosts(head).as_slice() {
        // Which only the old version allows (RFC 9112, 3.2).
        [] if version == "HTTP/1.0" => {}
        [host] if is_ours(host, own) => {}
        [_] => {
            let why = "Ask for the address of this PC, `localhost` or the agent's name";
            return Verdict::Refused("421 Misdirected Request", why);
        }
        _ => return Verdict::Refused("400 Bad Request", "There must be one Host"),
    }
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET", "/metrics") => Verdict::Metrics { head_only: false },
        ("HEAD", "/metrics") => Verdict::Metrics { head_only: true },
        (_, "/metrics") => Verdict::Refused("405 Method Not Allowed", "GET it"),
        _ => Verdict::Refused("404 Not Found", "There is only /metrics"),
    }
}

/// The values of the fields `Host`.
fn hosts(head: &[u8]) -> Vec<&[u8]> {
    let lines = head.split(|byte| *byte == b'\n').skip(1);
    let fields = lines.filter_map(|line| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        Some((line.get(..colon)?, line.get(colon + 1..)?))
    });
    fields
        .filter(|(name, _)| name.eq_ignore_ascii_case(b"host"))
        .map(|(_, value)| value.trim_ascii())
        .collect()
}

/// Whether `host`, with or without a port, cannot be a name that somebody else lets point here.
fn is_ours(host: &[u8], own: &str) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) && (!name.contains(':') || name.ends_with(']')) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let is_address = match bare {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => name.parse::<Ipv4Addr>().is_ok(),
    };
    is_address || [own, "localhost"].iter().any(|ours| name.eq_ignore_ascii_case(ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(head: &str) -> String {
        match judge(Some(head.as_bytes()), "pc2") {
            Verdict::Metrics { head_only } => format!("metrics {head_only}"),
            Verdict::Refused(status, _) => status.chars().take(3).collect(),
        }
    }

    #[test]
    fn only_a_get_of_metrics_gets_them() {
        for (head, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: 10.0.0.1", "metrics false"),
            ("GET /metrics?x=1 HTTP/1.0", "metrics false"),
            ("HEAD /metrics HTTP/1.1\r\nHost: pc2", "metrics true"),
            ("POST /metrics HTTP/1.1\r\nHost: pc2", "405"),
            ("GET / HTTP/1.1\r\nHost: pc2", "404"),
            ("GET /metrics/ HTTP/1.1\r\nHost: pc2", "404"),
            ("GET /metrics HTTP/2", "505"),
            ("GET /metrics", "400"),
            ("GET  /metrics HTTP/1.1", "400"),
            ("\u{0}omega", "400"),
            ("", "400"),
        ] {
            assert_eq!(verdict(head), expected, "{head:?}");
        }
        assert!(matches!(judge(None, "pc2"), Verdict::Refused(status, _) if status.starts_with("431")));
        assert!(
            matches!(judge(Some(b"\xff\xfe"), "pc2"), Verdict::Refused(status, _) if status.starts_with("400"))
        );
    }

    #[test]
    fn a_name_that_somebody_else_may_let_point_here_is_refused() {
        for host in
            ["127.0.0.1", "10.0.0.1:9742", "[::1]", "[fd00::7]:9742", "LOCALHOST:9742", "Pc2", " pc2:1 "]
        {
            let head = format!("GET /metrics HTTP/1.1\r\nAccept: */*\r\nhOST: {host}\r\nX: y");
            assert_eq!(verdict(&head), "metrics false", "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9742",
            "127.0.0.1.evil.example",
            "pc2.evil.example",
            "",
            "::1",
            "[::1",
        ] {
            assert_eq!(verdict(&format!("GET /metrics HTTP/1.1\r\nHost: {host}")), "421", "{host}");
        }
        assert_eq!(verdict("GET /metrics HTTP/1.1"), "400", "no host");
        assert_eq!(verdict("GET /metrics HTTP/1.1\r\nHost: pc2\r\nHost: evil"), "400", "two");
    }

    #[test]
    fn a_client_that_is_slow_keeps_no_other_waiting() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        crate::metrics::answer_on(&std::sync::Arc::new(listener), "pc2", || "omega 1\n".to_owned())
            .expect("threads");
        let _slow = TcpStream::connect(address).expect("it listens");
        let started = Instant::now();
        let mut socket = TcpStream::connect(address).expect("it listens");
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: pc2\r\n\r\n").expect("it is taken");
        let mut text = String::new();
        socket.read_to_string(&mut text).expect("text");
        assert!(text.ends_with("omega 1\n"), "{text}");
        assert!(started.elapsed() < READ_WITHIN, "{:?}", started.elapsed());
    }

    fn ask(request: &[u8]) -> (Vec<u8>, io::Result<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = thread::spawn(move || {
            let (socket, _) = listener.accept()?;
            answer(socket, "pc2", &|| "omega 1\n".to_owned())
        });
        let mut socket = TcpStream::connect(address).expect("it listens");
        socket.write_all(request).expect("it is taken");
        let mut answer = Vec::new();
        // It may end in a reset where not all of the request was read.
        let _ = socket.read_to_end(&mut answer);
        (answer, server.join().expect("no panic"))
    }

    #[test]
    fn an_answer_has_its_length_and_its_format() {
        let (answer, result) = ask(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        result.expect("it is answered");
        let text = String::from_utf8(answer).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("Content-Length: 8") && head.contains("version=0.0.4"), "{head}");
        assert_eq!(body, "omega 1\n");
        let (answer, _) = ask(b"HEAD /metrics HTTP/1.0\r\n\r\n");
        assert!(answer.ends_with(b"\r\n\r\n"), "a HEAD has no body");
    }

    #[test]
    fn a_peer_that_does_not_finish_its_request_is_cut_off() {
        let started = Instant::now();
        let (answer, result) = ask(b"GET /metrics HTTP/1.1\r\nHost: ");
        assert_eq!(answer, b"");
        assert!(result.is_err_and(|why| is_peers(&why)));
        assert!(started.elapsed() < READ_WITHIN * 3, "{:?}", started.elapsed());
    }

    #[test]
    fn a_head_without_end_is_refused_at_its_bound() {
        let mut request = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        request.resize(HEAD + 1024, b'x');
        let (answer, result) = ask(&request);
        result.expect("it is answered");
        assert!(answer.starts_with(b"HTTP/1.1 431 ") || answer.is_empty(), "{answer:?}");
    }

    #[test]
    fn whatever_comes_is_judged_and_only_what_begins_as_a_get_or_head_gets_metrics() {
        let seed = b"GET /metrics HTTP/1.1\r\nHost: agent\r\nAccept: text/plain";
        let mut x = 1u64;
        let mut random = move |below: usize| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 33) as usize % below
        };
        for _ in 0..20_000 {
            let mut head = seed.to_vec();
            for _ in 0..random(5) {
                let at = random(head.len());
                match random(3) {
                    0 => head[at] = random(256) as u8,
                    1 => drop(head.remove(at)),
                    _ => head.insert(at, random(256) as u8),
                }
            }
            if let Verdict::Metrics { .. } = judge(Some(&head), "pc2") {
                let allowed = head.starts_with(b"GET /metrics") || head.starts_with(b"HEAD /metrics");
                assert!(allowed, "{}", head.escape_ascii());
            }
        }
    }
}
