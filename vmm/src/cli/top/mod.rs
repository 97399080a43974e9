//! `omega top`: what the guests here do with other PCs, live.

mod memory;
mod sample;
mod span;
mod view;

use std::io::{self, IsTerminal, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use self::sample::{Report, Sampler};
use super::args::Order;
use super::signals::{self, Event};
use super::{Failure, args, show};
use crate::console::terminal;

/// The shortest interval: less would measure the measuring.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest interval.
const LONGEST: Duration = Duration::from_secs(3600);

/// What happened while the interval passed.
enum Wake {
    Key(u8),
    Redraw,
    End,
}

pub(super) fn top(args: &args::Top) -> Result<(), Failure> {
    let interval = args.interval.0;
    if !(SHORTEST..=LONGEST).contains(&interval) {
        return Err(Failure::usage("--interval: write a time between 100ms and 1h".to_owned()));
    }
    if args.once {
        return once(args, interval);
    }
    if args.json {
        return stream(args, interval);
    }
    if !(io::stdout().is_terminal() && io::stdin().is_terminal()) {
        return Err(Failure::usage(
            "`omega top` needs a terminal; `omega top --once` prints a table, `omega top --json` a stream"
                .to_owned(),
        ));
    }
    live(args, interval)
}

fn once(args: &args::Top, interval: Duration) -> Result<(), Failure> {
    let mut sampler = Sampler::default();
    sampler.sample()?;
    std::thread::sleep(interval);
    let report = sampler.sample()?;
    if args.json {
        return show(&format!("{}\n", super::json(&report)?));
    }
    show(&view::plain(&report, args.sort))
}

/// One JSON object a line, until nobody reads.
fn stream(args: &args::Top, interval: Duration) -> Result<(), Failure> {
    let _ = args;
    let mut sampler = Sampler::default();
    let mut due = Instant::now();
    sampler.sample()?;
    loop {
        due = next(due, interval);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut line = serde_json::to_vec(&sampler.sample()?).map_err(io::Error::other)?;
        line.push(b'\n');
        let mut out = io::stdout();
        match out.write_all(&line).and_then(|()| out.flush()) {
            Err(why) if why.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
    }
}

/// When the interval ends after one that ended at `due`: in step, unless this process was stopped meanwhile.
fn next(due: Instant, interval: Duration) -> Instant {
    let now = Instant::now();
    let next = due + interval;
    if next <= now { now + interval } else { next }
}

fn live(args: &args::Top, interval: Duration) -> Result<(), Failure> {
    let held = signals::hold()?;
    let (wake, woken) = channel();
    let raw = terminal::Raw::enter_screen()?;
    let tell = wake.clone();
    held.watch(move |event| {
        // The receiver goes only with the process.
        let _ = tell.send(match event {
            Event::End | Event::EndNow => Wake::End,
            Event::Window | Event::Continued => Wake::Redraw,
        });
    })?;
    // Ends with the process: nothing wakes who waits for a key.
    std::thread::Builder::new().name("keys".into()).spawn(move || keys(&wake))?;
    let result = show_live(args.sort, interval, &woken);
    drop(raw);
    result
}

fn keys(wake: &Sender<Wake>) {
    let mut key = [0; 1];
    while let Ok(1) = io::stdin().read(&mut key) {
        if wake.send(Wake::Key(key[0])).is_err() {
            return;
        }
    }
    let _ = wake.send(Wake::End);
}

fn show_live(mut order: Order, interval: Duration, woken: &Receiver<Wake>) -> Result<(), Failure> {
    let mut sampler = Sampler::default();
    let mut due = Instant::now();
    let mut report = sampler.sample()?;
    loop {
        draw(&report, order, interval)?;
        due = next(due, interval);
        loop {
            match woken.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) => break,
                Ok(Wake::End | Wake::Key(b'q' | b'Q' | 3)) | Err(RecvTimeoutError::Disconnected) => {
                    return Ok(());
                }
                Ok(Wake::Key(b's')) => {
                    order = if order == Order::Name { Order::Traffic } else { Order::Name };
                    draw(&report, order, interval)?;
                }
                Ok(Wake::Redraw) => draw(&report, order, interval)?,
                Ok(Wake::Key(_)) => {}
            }
        }
        report = sampler.sample()?;
    }
}

/// Draws the whole screen with one write, over what is there, so that nothing flickers.
fn draw(report: &Report, order: Order, interval: Duration) -> Result<(), Failure> {
    if !terminal::is_raw() {
        // Stopped, or in the background: the terminal is somebody else's.
        return Ok(());
    }
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    let lines = view::screen(report, order, interval, columns.into(), rows.into());
    let mut frame = String::from("\x1b[H");
    for (at, line) in lines.iter().enumerate() {
        frame.push_str(if at == 0 { "" } else { "\r\n" });
        frame.push_str(line);
        frame.push_str("\x1b[K");
    }
    frame.push_str("\x1b[J");
    let mut out = io::stdout();
    Ok(out.write_all(frame.as_bytes()).and_then(|()| out.flush())?)
}
