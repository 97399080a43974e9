//! Tries every kind of request on an agent, as whoever it is told to be, and says what came of each: one line,
//! `KIND answered`, `KIND refused STATUS: WHY` or `KIND unanswered: WHY`.
//!
//! ```text
//! lab-prober ADDRESS VOLUME plain                       without TLS
//! lab-prober ADDRESS VOLUME bare CA.pem                 by TLS, but without a certificate
//! lab-prober ADDRESS VOLUME as FOLDER                   as the node whose identity is in FOLDER
//! ```
//!
//! A further `EPOCH HOLDER` (in decimal and in hexadecimal) names the lease of somebody else that is tried; each
//! request then has a connection of its own. Otherwise it takes a lease itself, and all go over one connection.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use devices::disk::volume::{Access, Acquire, Acquired, Lease, Open, Refusal, opcode};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use transport::blocking::{Client, Reply};
use transport::identity::{ALPN, Identity, Reloading, Security, revocation};
use transport::wire::{Class, Status};

/// Who an agent that lets one in answers at once; who is not let in waits no longer than this.
const PATIENCE: Duration = Duration::from_secs(5);
/// What is read and written.
const LEN: usize = 4096;

/// Every kind of request that an agent answers, in an order in which its holder may make them.
const KINDS: [&str; 12] = [
    "ACQUIRE",
    "OPEN",
    "RENEW",
    "READ",
    "WRITE",
    "FLUSH",
    "DISCARD",
    "WRITE_ZEROES",
    "VOLUMES",
    "INVENTORY",
    "REVOCATIONS",
    "RELEASE",
];

fn call(client: &mut Client, kind: &str, volume: &str, lease: Lease) -> Result<Reply> {
    let Lease { epoch, holder } = lease;
    let access = |len: usize| Access { epoch, offset: 0, len: len as u64, unmap: false }.encode();
    let acquire = || Acquire { volume: volume.to_owned(), holder, expected: 0, name: "prober".to_owned() };
    let mut payload = Vec::new();
    let (opcode, body, answer) = match kind {
        "ACQUIRE" => (opcode::ACQUIRE, acquire().encode(), 0),
        "OPEN" => (opcode::OPEN, Open { epoch, holder }.encode(), 0),
        "RENEW" => (opcode::RENEW, lease.encode(), 0),
        "RELEASE" => (opcode::RELEASE, lease.encode(), 0),
        "READ" => (opcode::READ, access(LEN), LEN),
        "WRITE" => {
            payload = vec![0xee; LEN];
            (opcode::WRITE, access(LEN), 0)
        }
        "FLUSH" => (opcode::FLUSH, access(0), 0),
        "DISCARD" => (opcode::DISCARD, access(LEN), 0),
        "WRITE_ZEROES" => (opcode::WRITE_ZEROES, access(LEN), 0),
        "VOLUMES" => (opcode::VOLUMES, transport::wire::Body::new(), 1 << 20),
        "INVENTORY" => (opcode::INVENTORY, transport::wire::Body::new(), 1 << 20),
        "REVOCATIONS" => (revocation::OPCODE, transport::wire::Body::new(), 1 << 20),
        other => bail!("no kind of request: {other}"),
    };
    Ok(client.call(Class::Control, opcode, &body, payload, answer, PATIENCE)?)
}

fn outcome(kind: &str, result: &Result<Reply>) -> String {
    match result {
        Ok(reply) if reply.status == Status::OK => format!("{kind} answered"),
        Ok(reply) => {
            let why = Refusal::decode(&reply.body).map(|refusal| refusal.text).unwrap_or_default();
            format!("{kind} refused {:#06x}: {why}", reply.status.0)
        }
        Err(why) => format!("{kind} unanswered: {why:#}"),
    }
}

/// All kinds over one connection, under a lease of its own.
fn as_holder(address: &str, volume: &str, security: &Security) -> Result<()> {
    let mut client = Client::new(address, "prober", security, None)?;
    let mut lease = Lease { epoch: 0, holder: u128::from(std::process::id()) };
    for kind in KINDS {
        let result = call(&mut client, kind, volume, lease);
        if let ("ACQUIRE", Ok(reply)) = (kind, &result)
            && reply.status == Status::OK
        {
            lease.epoch = Acquired::decode(&reply.body).context("the answer to ACQUIRE")?.epoch;
        }
        println!("{}", outcome(kind, &result));
    }
    Ok(())
}

/// Each kind over a connection of its own, under somebody else's lease.
fn as_thief(address: &str, volume: &str, security: &Security, lease: Lease) {
    thread::scope(|scope| {
        for kind in KINDS {
            scope.spawn(move || {
                let client = Client::new(address, "prober", security, None);
                let result =
                    client.map_err(anyhow::Error::from).and_then(|mut c| call(&mut c, kind, volume, lease));
                println!("{}", outcome(kind, &result));
            });
        }
    });
}

/// A TLS connection as whoever has the authority's certificate, which is no secret, and none of its own.
fn without_certificate(address: &str, ca: &str) -> Result<()> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).map_err(|why| anyhow::anyhow!("{ca}: {why}"))?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let name: ServerName<'static> = Identity::server_name(None)?;
    let socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut stream = StreamOwned::new(ClientConnection::new(Arc::new(config), name)?, socket);
    // The client's handshake is over before the server has judged it (RFC 8446, 2): only an answer would tell.
    let mut said = [0; 16];
    let result = stream.write_all(b"omega\x0d\x0a\x1a").and_then(|()| stream.flush());
    match result.and_then(|()| stream.read(&mut said)) {
        Ok(1..) => println!("HELLO answered"),
        Ok(0) => println!("HELLO unanswered: the connection was closed"),
        Err(why) => println!("HELLO unanswered: {why}"),
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [address, volume, who @ ..] = arguments.as_slice() else { bail!("ADDRESS VOLUME WHO") };
    let (security, lease) = match who {
        ["bare", ca] => return without_certificate(address, ca),
        ["plain", lease @ ..] => (Security::Plain, lease),
        ["as", folder, lease @ ..] => {
            fs::metadata(folder).with_context(|| (*folder).to_owned())?;
            (Security::Tls(Reloading::load(Path::new(folder))?), lease)
        }
        other => bail!("{other:?} is nobody"),
    };
    match lease {
        [epoch, holder] => {
            let lease = Lease { epoch: epoch.parse()?, holder: u128::from_str_radix(holder, 16)? };
            as_thief(address, volume, &security, lease);
            Ok(())
        }
        _ => as_holder(address, volume, &security),
    }
}
