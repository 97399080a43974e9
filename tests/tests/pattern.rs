//! The pattern checker that guests run notices what it is there to notice.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

const MIB: u64 = 8;
const PAGE: u64 = 4096;
/// Pages that are spoilt at once: more than the threads can be writing at that moment.
const SPOILT: u64 = 64;

/// The checker, compiled as the image of the mini guest does.
fn compile(folder: &Path) -> std::path::PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/pattern/omega-pattern.c");
    let program = folder.join("omega-pattern");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o"]).arg(&program).arg(source);
    assert!(cc.status().expect("a C compiler").success());
    program
}

/// A checker that runs for as long as it finds nothing.
struct Checker {
    child: Child,
    output: BufReader<ChildStdout>,
    memory: File,
    start: u64,
}

impl Drop for Checker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Checker {
    /// After its first rounds.
    fn start(program: &Path) -> Self {
        let mut command = Command::new(program);
        command.args([MIB.to_string().as_str(), "2", "1000000"]).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        for _ in 0..3 {
            output.read_line(&mut String::new()).expect("a line for each round");
        }
        let memory = File::options().read(true).write(true).open(format!("/proc/{}/mem", child.id()));
        let start = Self::find(child.id());
        Self { child, output, memory: memory.expect("our own child's memory"), start }
    }

    /// Where its memory begins: at a page that says that it is page 0, followed by one that says that it is 1.
    fn find(id: u32) -> u64 {
        let maps = fs::read_to_string(format!("/proc/{id}/maps")).expect("its maps");
        let memory = File::open(format!("/proc/{id}/mem")).expect("its memory");
        let mut largest = (0, 0);
        for line in maps.lines() {
            let Some((start, end)) = line.split_whitespace().next().and_then(|range| range.split_once('-'))
            else {
                continue;
            };
            let number = |text| u64::from_str_radix(text, 16).expect("an address");
            let (start, end) = (number(start), number(end));
            if line.contains("rw-p") && !line.contains('[') {
                largest = largest.max((end - start, start));
            }
        }
        let (len, start) = largest;
        assert!(len >= MIB << 20, "no mapping of {MIB} MiB: {maps}");
        // The kernel may have joined the mapping with one beside it. Each page's first word is its number, XORed
        // with the same secret; pages that were given back hold zeros.
        let at = |address| {
            let mut word = [0; 8];
            memory.read_exact_at(&mut word, address).expect("mapped");
            u64::from_le_bytes(word)
        };
        let pages = MIB << 20 >> 12;
        (start..=start + len - (MIB << 20))
            .step_by(PAGE as usize)
            .find(|&start| {
                let secret = at(start + 5 * PAGE) ^ 5;
                let fits = |page: u64| {
                    let word = at(start + page * PAGE);
                    word == 0 || word ^ page == secret
                };
                secret != 5 && (0..pages).all(fits)
            })
            .expect("its pages")
    }

    fn stop(&self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGSTOP).expect("our own child");
        waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("it stops");
    }

    fn go_on(&self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGCONT).expect("our own child");
    }

    fn read(&self, page: u64) -> Vec<u8> {
        let mut content = vec![0; PAGE as usize];
        self.memory.read_exact_at(&mut content, self.start + page * PAGE).expect("its page");
        content
    }

    fn write(&self, page: u64, content: &[u8]) {
        self.memory.write_all_at(content, self.start + page * PAGE).expect("its page");
    }

    /// What it says when it goes on.
    fn verdict(mut self) -> String {
        self.go_on();
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).expect("text");
        let code = self.child.wait().expect("an end").code();
        let line = rest.lines().find(|line| line.contains("WRONG")).unwrap_or(&rest).to_owned();
        assert_eq!(code, Some(1), "{line}");
        line
    }
}

/// The pages that are spoilt.
fn victims() -> impl Iterator<Item = u64> {
    (0..SPOILT).map(|i| 3 + i * ((MIB << 20) / PAGE / SPOILT))
}

#[test]
fn nothing_wrong_is_found_where_nothing_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new(compile(folder.path())).args(["8", "3", "7"]).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("omega-pattern: ok: 2048 pages, 14336 checks"),
        "{said}"
    );
}

/// What is said when `spoil` changes the memory of a checker that stands still. A thread that stood still while it
/// wrote one of those pages finds its own work undone, which is another case: then once more.
fn said_after(spoil: impl Fn(&Checker)) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let program = compile(folder.path());
    loop {
        let checker = Checker::start(&program);
        checker.stop();
        spoil(&checker);
        let line = checker.verdict();
        if !line.contains("read back") {
            return line;
        }
    }
}

#[test]
fn a_zeroed_page_is_reported() {
    let line = said_after(|checker| victims().for_each(|page| checker.write(page, &[0; PAGE as usize])));
    assert!(line.contains("zeroed"), "{line}");
}

#[test]
fn an_older_generation_is_reported_as_stale() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut checker = Checker::start(&compile(folder.path()));
    checker.stop();
    let old: Vec<_> = victims().map(|page| checker.read(page)).collect();
    checker.go_on();
    let generation = |content: &[u8]| content[8..16].to_vec();
    loop {
        for _ in 0..4 {
            checker.output.read_line(&mut String::new()).expect("a line for each round");
        }
        checker.stop();
        // Only where a whole older page goes to one that holds a whole newer one.
        let newer = |(page, old): &(u64, &Vec<u8>)| {
            let now = checker.read(*page);
            generation(&now) != generation(old) && is_whole(&now) && is_whole(old)
        };
        let aged: Vec<_> = victims().zip(&old).filter(newer).collect();
        if aged.len() > 8 {
            aged.into_iter().for_each(|(page, old)| checker.write(page, old));
            break;
        }
        checker.go_on();
    }
    let line = checker.verdict();
    assert!(line.contains("stale"), "{line}");
}

/// Whether the content is all of one page: from the third on, the distances between words are the same.
fn is_whole(content: &[u8]) -> bool {
    let words: Vec<u64> =
        content.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes"))).collect();
    let distance = words[3].wrapping_sub(words[2]);
    words[1] != 0 && words[2..].windows(2).all(|pair| pair[1].wrapping_sub(pair[0]) == distance)
}

#[test]
fn a_page_in_anothers_place_is_reported() {
    let line = said_after(|checker| {
        let others = victims().map(|page| checker.read(page + 1));
        let source = others.into_iter().find(|content| is_whole(content)).expect("a page that is not zero");
        victims().for_each(|page| checker.write(page, &source));
    });
    assert!(line.contains("misplaced"), "{line}");
}

#[test]
fn one_wrong_bit_is_reported() {
    let line = said_after(|checker| {
        for page in victims() {
            let mut content = checker.read(page);
            content[4095] ^= 1;
            checker.write(page, &content);
        }
    });
    assert!(line.contains("torn, 1 of 512 words"), "{line}");
}
