//! Against the PC16550D data sheet.

use std::sync::atomic::AtomicUsize;

use super::*;

// Register offsets (data sheet, table I).
const RBR_THR: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const SCR: u64 = 7;

#[derive(Default)]
struct Line(AtomicUsize);

impl InterruptLine for Line {
    fn set(&self, _high: bool) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Rig {
    serial: Serial,
    line: Arc<Line>,
    sink: Sink,
}

fn rig() -> Rig {
    let (line, sink) = (Arc::new(Line::default()), Sink::default());
    let irq: Arc<dyn InterruptLine> = Arc::clone(&line) as _;
    let serial = Serial::new(irq, Box::new(sink.clone())).expect("an eventfd is left");
    Rig { serial, line, sink }
}

impl Rig {
    fn read(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.serial.read(offset, &mut byte);
        byte[0]
    }

    fn write(&self, offset: u64, byte: u8) {
        self.serial.write(offset, &[byte]);
    }

    fn interrupts(&self) -> usize {
        self.line.0.swap(0, Ordering::Relaxed)
    }

    fn drain(&self) -> Vec<u8> {
        std::iter::from_fn(|| (self.read(LSR) & 1 != 0).then(|| self.read(RBR_THR))).collect()
    }
}

#[test]
fn what_the_guest_sends_reaches_the_writer_and_the_transmitter_is_always_empty() {
    let rig = rig();
    for byte in *b"ok\n" {
        assert_eq!(rig.read(LSR) & 0x60, 0x60, "THRE and TEMT");
        rig.write(RBR_THR, byte);
    }
    assert_eq!(*lock(&rig.sink.0), b"ok\n");
    assert_eq!(rig.interrupts(), 0, "none are enabled");
}

#[test]
fn it_identifies_itself_as_a_16550a_with_a_working_fifo() {
    let rig = rig();
    rig.write(IIR_FCR, 1);
    assert_eq!(rig.read(IIR_FCR), 0xc1, "FIFOs on, no interrupt");
    rig.write(SCR, 0x5a);
    assert_eq!(rig.read(SCR), 0x5a);
}

#[test]
fn the_divisor_is_behind_dlab_and_sends_nothing() {
    let rig = rig();
    rig.write(LCR, 0x83);
    rig.write(RBR_THR, 1);
    rig.write(IER, 0);
    assert_eq!((rig.read(RBR_THR), rig.read(IER)), (1, 0));
    rig.write(LCR, 3);
    assert!(lock(&rig.sink.0).is_empty());
}

#[test]
fn enabling_the_transmitter_interrupt_raises_it_and_reading_iir_acknowledges_it() {
    let rig = rig();
    rig.write(IER, 2);
    assert_eq!(rig.interrupts(), 1);
    assert_eq!(rig.read(IIR_FCR) & 0xf, 2);
    assert_eq!(rig.read(IIR_FCR) & 0xf, 1);
    rig.write(RBR_THR, b'x');
    assert_eq!(rig.interrupts(), 1, "the byte is out already");
}

#[test]
fn input_waits_in_the_fifo_and_raises_one_interrupt() {
    let rig = rig();
    rig.write(IER, 1);
    assert_eq!(rig.serial.enqueue(b"abc"), 3);
    assert_eq!(rig.interrupts(), 1);
    assert_eq!(rig.read(IIR_FCR) & 0xf, 4);
    assert_eq!(rig.drain(), b"abc");
    assert_eq!(rig.read(LSR) & 1, 0);
}

#[test]
fn a_full_fifo_takes_no_more_and_says_when_it_is_empty_again() {
    let rig = rig();
    let input: Vec<u8> = (0..100).collect();
    let taken = rig.serial.enqueue(&input);
    assert_eq!(taken, FIFO);
    assert_eq!(rig.serial.enqueue(&input[taken..]), 0);
    assert!(rig.serial.room().read().is_err(), "not yet");
    let mut all = rig.drain();
    assert_eq!(rig.serial.room().read().expect("it is signalled"), 1);
    assert_eq!(rig.serial.enqueue(&input[taken..]), input.len() - taken);
    all.extend(rig.drain());
    assert_eq!(all, input, "nothing is lost or doubled");
    assert!(rig.serial.room().read().is_err(), "nobody was refused since");
}

#[test]
fn loop_back_connects_the_transmitter_to_the_receiver() {
    let rig = rig();
    rig.write(MCR, 0x10);
    rig.write(RBR_THR, b'z');
    assert_eq!(rig.serial.enqueue(b"lost"), 4);
    assert_eq!(rig.drain(), b"z");
    assert!(lock(&rig.sink.0).is_empty());
}

#[test]
fn a_stopped_port_takes_no_input_and_asks_for_it_when_it_starts() {
    let rig = rig();
    rig.write(IER, 1);
    rig.serial.stop().expect("it stops");
    assert_eq!(rig.serial.enqueue(b"x"), 0);
    assert_eq!(rig.interrupts(), 0);
    rig.serial.start().expect("it starts");
    assert!(rig.serial.room().read().is_ok());
    assert_eq!(rig.serial.enqueue(b"x"), 1);
    assert_eq!(rig.interrupts(), 1);
}

#[test]
fn registers_and_unread_input_survive_save_and_restore() {
    let (old, new) = (rig(), rig());
    old.write(LCR, 0x1b);
    old.write(IER, 1);
    old.serial.enqueue(b"typed");
    let state = old.serial.save().expect("it saves");
    new.serial.restore(&state).expect("it restores");
    assert_eq!(new.serial.save().expect("it saves"), state);
    assert_eq!((new.read(LCR), new.read(IER)), (0x1b, 1));
    assert_eq!(new.drain(), b"typed");
    new.write(RBR_THR, b'!');
    assert_eq!(*lock(&new.sink.0), b"!", "the writer is still connected");
    new.serial.reset().expect("it resets");
    assert_eq!((new.read(LCR), new.read(IER)), (3, 0));
}

#[test]
fn a_state_that_is_not_its_own_or_too_long_is_refused() {
    let rig = rig();
    let state = rig.serial.save().expect("it saves");
    let mut other = state.clone();
    other.version = 99;
    assert!(matches!(rig.serial.restore(&other), Err(Error::Foreign { .. })));
    other = state.clone();
    other.data["received"] = serde_json::json!(vec![0; FIFO + 1]);
    assert!(matches!(rig.serial.restore(&other), Err(Error::Invalid { .. })));
    other = state.clone();
    other.data["ier"] = serde_json::json!(256);
    assert!(matches!(rig.serial.restore(&other), Err(Error::Invalid { .. })));
    assert_eq!(rig.serial.save().expect("it saves"), state, "unchanged");
}

#[test]
fn any_access_of_any_size_is_harmless() {
    let rig = rig();
    for offset in [0, 1, 7, 8, 255, 256, u64::MAX] {
        for len in [0, 1, 2, 4, 8, 64] {
            rig.serial.read(offset, &mut vec![0; len]);
            rig.serial.write(offset, &vec![0xff; len]);
        }
    }
}
