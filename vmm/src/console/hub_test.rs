//! The hub with clients on its socket; its terminal is tested with the binary, in `tests/console.rs`.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Hub, Options};
use crate::config::Serial;

fn open(serial: &Serial, socket: &Path) -> Hub {
    Hub::open(serial, Options { socket: Some(socket.to_owned()), command: None }).expect("the hub opens")
}

fn attach(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("the hub listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out is valid");
    stream
}

fn expect(stream: &mut UnixStream, text: &str) {
    let mut got = vec![0; text.len()];
    stream.read_exact(&mut got).unwrap_or_else(|why| panic!("expected {text:?}: {why}"));
    assert_eq!(String::from_utf8_lossy(&got), text);
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_client_sees_what_was_written_before_and_after_it_came() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("console.sock");
    let hub = open(&Serial::Console, &socket);
    let mode = std::fs::metadata(&socket).expect("the socket is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut guest = hub.writer();
    guest.write_all(b"before\r\n").expect("writing never fails");
    let mut first = attach(&socket);
    expect(&mut first, "before\r\n");
    let mut second = attach(&socket);
    expect(&mut second, "before\r\n");
    for byte in b"after\r\n" {
        guest.write_all(&[*byte]).expect("writing never fails");
    }
    expect(&mut first, "after\r\n");
    expect(&mut second, "after\r\n");
    guest.write_all(b"last words").expect("writing never fails");
    hub.finish();
    expect(&mut first, "last words");
    assert_eq!(first.read(&mut [0]).expect("the end"), 0, "a client sees that the console ended");
    guest.write_all(b"nobody").expect("writing never fails");
}

#[test]
fn input_waits_until_the_guest_takes_it_and_keeps_its_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("console.sock");
    let hub = open(&Serial::Console, &socket);
    let mut client = attach(&socket);
    let sent: Vec<u8> = (0..50_000u32).map(|at| (at % 251) as u8).collect();
    let early = sent[..100].to_vec();
    client.write_all(&early).expect("the hub reads");
    // As a UART does it: a small FIFO that is full most of the time.
    let got = Arc::new(Mutex::new(Vec::new()));
    let room = Arc::new(AtomicUsize::new(0));
    let (sink, space) = (Arc::clone(&got), Arc::clone(&room));
    hub.connect_input(move |bytes| {
        let taken = bytes.len().min(space.swap(0, Ordering::SeqCst));
        sink.lock().expect("no panic").extend_from_slice(&bytes[..taken]);
        taken
    });
    let late = sent[100..].to_vec();
    let writer = std::thread::spawn(move || client.write_all(&late).map(|()| client));
    eventually("all input arrives", || {
        room.store(64, Ordering::SeqCst);
        hub.input_ready();
        got.lock().expect("no panic").len() == sent.len()
    });
    assert_eq!(*got.lock().expect("no panic"), sent);
    drop(writer.join().expect("no panic").expect("the hub took all"));
    hub.finish();
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody_and_is_told_what_it_missed() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("console.sock");
    let hub = open(&Serial::Console, &socket);
    let mut lazy = attach(&socket);
    let mut guest = hub.writer();
    // Attached before the flood: who comes later gets the end of it and has missed nothing.
    guest.write_all(b"hello").expect("writing never fails");
    expect(&mut lazy, "hello");
    let line = [b'x'; 1024];
    let start = Instant::now();
    for _ in 0..8192 {
        guest.write_all(&line).expect("writing never fails");
    }
    assert!(start.elapsed() < Duration::from_secs(10), "the guest waited: {:?}", start.elapsed());
    // The notice comes once the hub had room again.
    let notice = b"bytes of output were dropped here]";
    lazy.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out is valid");
    let mut seen = Vec::new();
    let mut buffer = vec![0; 65536];
    while !seen.windows(notice.len()).any(|part| part == notice) {
        match lazy.read(&mut buffer) {
            Ok(taken @ 1..) => seen.extend_from_slice(&buffer[..taken]),
            end => panic!("{end:?} after {} bytes without the notice", seen.len()),
        }
    }
    assert!(seen.len() < 8 << 20, "nothing was dropped: {}", seen.len());
    hub.finish();
}

#[test]
fn a_file_gets_all_output_behind_what_it_held() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    std::fs::write(&path, "old\n").expect("the file");
    let hub = open(&Serial::File(path.clone()), &folder.path().join("console.sock"));
    hub.writer().write_all(b"new\n").expect("writing never fails");
    hub.finish();
    assert_eq!(std::fs::read_to_string(&path).expect("the file"), "old\nnew\n");
    let missing = folder.path().join("no/log");
    let refused = Hub::open(&Serial::File(missing), Options::default());
    assert!(matches!(refused, Err(super::Error::File { .. })));
}

#[test]
fn a_window_that_changes_is_reported_and_known_to_who_comes_later() {
    let hub = Hub::open(&Serial::Off, Options::default()).expect("the hub opens");
    hub.resize(100, 40);
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&told);
    hub.connect_resize(move |columns, rows| list.lock().expect("no panic").push((columns, rows)));
    hub.resize(80, 25);
    assert_eq!(*told.lock().expect("no panic"), [(100, 40), (80, 25)]);
    hub.finish();
}

#[test]
fn more_clients_than_fit_are_turned_away_and_leave_room_when_they_go() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("console.sock");
    let hub = open(&Serial::Console, &socket);
    hub.writer().write_all(b"hi").expect("writing never fails");
    let mut clients: Vec<_> = (0..8).map(|_| attach(&socket)).collect();
    for client in &mut clients {
        expect(client, "hi");
    }
    let mut refused = String::new();
    attach(&socket).read_to_string(&mut refused).expect("the hub hangs up");
    assert!(refused.contains("too many consoles"), "{refused:?}");
    clients.pop();
    eventually("there is room again", || {
        let mut client = attach(&socket);
        let mut first = [0; 2];
        client.read_exact(&mut first).expect("an answer");
        &first == b"hi"
    });
    hub.finish();
}
