use std::path::{Path, PathBuf};

use proptest::prelude::*;
use smallvec::smallvec;

use super::*;

fn message() -> Message {
    Message {
        destination: Destination::AllBut(ApicId(3)),
        delivery: Delivery::Fixed,
        vector: 0xfd,
        trigger: Trigger::Level,
        asserted: true,
    }
}

fn create() -> Create {
    Create {
        member: Member::new(1).expect("a member"),
        shards: 4,
        address_bits: 46,
        counts: smallvec![2, 2],
        ram: 2 << 30,
        homes: smallvec![1 << 18, 1 << 18],
        tsc_khz: 2_400_000,
    }
}

/// One of each.
fn samples() -> Vec<(&'static str, Body)> {
    let targets: Targets = [ApicId(0), ApicId(63)].into_iter().collect();
    let view = View { id: ApicId(3), ldr: 8, dfr: 0xf, tpr: 0x20, enabled: true };
    let part = Part { cpu: 2, offset: 16384, total: 20000 };
    let purpose = Purpose::Cpus {
        holder: 7 << 90,
        count: 2,
        ram: 2 << 30,
        patience: Some(Duration::from_secs(60)),
        guest: "desktop".into(),
    };
    let data = Data::new(&[1, 2, 3, 4], 4);
    let exits = [
        ("exit-port-read", VmExit::PortRead { port: 0x3fd, size: 1 }),
        ("exit-port-write", VmExit::PortWrite { port: 0x3f8, data: Data::new(b"x", 1) }),
        ("exit-mmio-read", VmExit::MmioRead { address: 0xfec0_0010, size: 4 }),
        ("exit-mmio-write", VmExit::MmioWrite { address: 0xfec0_0000, data }),
        ("exit-interrupted", VmExit::Interrupted),
        ("exit-halted", VmExit::Halted),
        ("exit-triple-fault", VmExit::TripleFault),
        ("exit-failed", VmExit::Failed("KVM gave up".into())),
    ];
    let moment = Moment { tsc: Tsc(77), monotonic: Nanos(99) };
    let mut samples = vec![
        ("purpose-cpus", purpose.encode()),
        ("purpose-memory", Purpose::Memory { epoch: 9, holder: 7 << 90, shard: 3 }.encode()),
        ("create", ToHelper::Create(create()).encode()),
        ("enter", ToHelper::Enter(2, VmEntry::Continue).encode()),
        ("enter-read", ToHelper::Enter(2, VmEntry::Read(data)).encode()),
        ("kick", ToHelper::Kick(3).encode()),
        ("interrupt", ToHelper::Interrupt(targets, message()).encode()),
        ("view", ToHelper::View(view).encode()),
        ("save", ToHelper::Save(2).encode()),
        ("restore", ToHelper::Restore(part).encode()),
        ("probe", ToHelper::Probe(5, Nanos(1 << 40)).encode()),
        ("clock", ToHelper::Clock { nanos: u64::MAX, tsc: 1 << 50 }.encode()),
        ("leave", ToHelper::Leave(2).encode()),
        ("end", ToHelper::End("the guest was shut down".into()).encode()),
        ("granted", ToConsole::Granted { epoch: 12, tsc_khz: 2_400_000 }.encode()),
        ("created", ToConsole::Created.encode()),
        ("eoi", ToConsole::Eoi(0x31).encode()),
        ("refused", ToConsole::Refused(0x31).encode()),
        ("state", ToConsole::State(part).encode()),
        ("restored", ToConsole::Restored(2).encode()),
        ("answer", ToConsole::Answer(5, Nanos(1 << 40), moment).encode()),
        ("untaken", ToConsole::Untaken(2, "it is of another kind".into()).encode()),
        ("failed", ToConsole::Failed("there is no memory".into()).encode()),
    ];
    samples.extend(exits.map(|(name, exit)| (name, ToConsole::Exit(2, exit).encode())));
    samples
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/span")
}

#[test]
fn what_is_decoded_is_what_was_encoded() {
    for message in [ToHelper::Create(create()), ToHelper::Interrupt(Targets::default(), message())] {
        assert_eq!(ToHelper::decode(&message.encode()), Ok(message));
    }
    for (name, bytes) in samples() {
        let known = Purpose::decode(&bytes).is_ok()
            || ToHelper::decode(&bytes).is_ok()
            || ToConsole::decode(&bytes).is_ok();
        assert!(known, "{name} decodes");
        fuzz(&bytes);
    }
}

#[test]
fn values_out_of_bounds_are_refused() {
    let bad = |change: fn(&mut Create)| {
        let mut create = create();
        change(&mut create);
        ToHelper::decode(&ToHelper::Create(create).encode()).is_err()
    };
    assert!(bad(|c| c.counts = smallvec![0, 4]), "vCPU 0 is the console node's");
    assert!(bad(|c| c.counts = smallvec![4, 0]));
    assert!(bad(|c| c.counts = smallvec![MOST_CPUS, 1]));
    assert!(bad(|c| (c.counts, c.homes) = (smallvec![4], smallvec![1 << 19])), "a helper alone");
    assert!(bad(|c| c.member = Member::new(2).expect("a member")));
    assert!(bad(|c| c.ram = 4097));
    assert!(bad(|c| c.ram = MOST_RAM + 4096));
    assert!(bad(|c| c.shards = 0));
    assert!(bad(|c| c.tsc_khz = 0));
    assert!(ToHelper::decode(&[3, MOST_CPUS]).is_err());
    assert!(ToHelper::decode(&[11, MOST_CPUS]).is_err());
    assert!(ToConsole::decode(&[3, 1, 1, 0, 0, 0]).is_err(), "a read of nothing");
    assert!(ToConsole::decode(&[3, 1, 1, 0, 0, 5]).is_err(), "a port is at most four bytes wide");
    let part = Part { cpu: 1, offset: 5, total: 5 };
    assert!(ToConsole::decode(&ToConsole::State(part).encode()).is_err());
}

#[test]
fn vcpus_are_numbered_in_the_order_of_members() {
    let at = |member, counts: &[u8]| {
        let member = Member::new(member).expect("a member");
        let create = Create { member, counts: SmallVec::from_slice(counts), ..create() };
        (create.here(), create.cpus(), create.members())
    };
    assert_eq!(at(1, &[1, 2, 3]), (1..3, 6, 3));
    assert_eq!(at(2, &[1, 2, 3]), (3..6, 6, 3));
    assert_eq!(at(3, &[1, 2, 3]), (6..6, 6, 3), "nobody");
}

/// `OMEGA_WRITE_SEEDS=1 cargo test -p omega-vmm span` writes them again.
#[test]
fn the_fuzz_corpus_holds_the_samples_and_nothing_in_it_does_harm() {
    let folder = corpus();
    for (name, bytes) in samples() {
        if std::env::var_os("OMEGA_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&folder).expect("a folder");
            std::fs::write(folder.join(name), &bytes).expect("a file");
        }
        assert_eq!(std::fs::read(folder.join(name)).expect("a file"), bytes.as_slice(), "{name}");
    }
    for entry in std::fs::read_dir(folder).expect("the corpus is there") {
        let bytes = std::fs::read(entry.expect("an entry").path()).expect("readable");
        fuzz(&bytes);
        for at in 0..bytes.len() {
            for value in 0..=u8::MAX {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                fuzz(&bytes);
            }
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
        fuzz(&bytes);
    }
}
