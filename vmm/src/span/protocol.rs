//! What the console node and a helper say to each other about the vCPUs that run there, as plain values. Each body has one
//! encoding; what is long travels as the message's payload. The bytes are drawn in `docs/span-protocol.md`.

use std::time::Duration;

use devices::interrupt::{ApicId, Delivery, Destination, Message, Nanos, Targets, Trigger, Tsc, View};
use smallvec::SmallVec;
use transport::wire::Body;
use transport::wire::fields::{self, Malformed, Reader};

use crate::cpu::{Data, VmEntry, VmExit};
use crate::memory::coherence::message::{MEMBERS, Member};

/// So many vCPUs a guest has at most.
pub const MOST_CPUS: u8 = 64;
/// A vCPU's state has so many bytes at most; it travels in parts.
pub const MOST_STATE: u32 = 256 << 10;
/// The longest text in bytes.
const MOST_TEXT: usize = 512;
/// The most RAM of a spanning guest, in bytes.
pub const MOST_RAM: u64 = 64 << 30;
/// So many shards its memory has at most.
pub const MOST_SHARDS: u8 = 16;

/// What a line is for: the body of its opening.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// vCPUs of a guest: it takes a lease of so many.
    Cpus {
        /// Who takes it: a random number for each run of a guest, which nobody else knows.
        holder: u128,
        /// How many vCPUs.
        count: u8,
        /// The guest's RAM in bytes, all of which the helper must have room for.
        ram: u64,
        /// How long the helper keeps what it has of the guest when it does not hear the console node; `None`: as long
        /// as it does for anybody.
        patience: Option<Duration>,
        /// The guest's name: shown, not trusted.
        guest: String,
    },
    /// A shard of a guest's memory.
    Memory {
        /// The lease's epoch.
        epoch: u64,
        /// Who has it.
        holder: u128,
        /// Which shard.
        shard: u8,
    },
}

/// A guest's share of one helper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// Which member the helper is.
    pub member: Member,
    /// The members' pieces of memory are spread over so many shards.
    pub shards: u8,
    /// How many bits a guest-physical address has.
    pub address_bits: u8,
    /// How many vCPUs each member runs when the guest starts, by the member's number: one for each member. vCPUs are
    /// numbered in this order, and their numbers are their APIC IDs.
    pub counts: SmallVec<[u8; MEMBERS]>,
    /// The guest's RAM in bytes.
    pub ram: u64,
    /// How many pages of it each member is home to, in order along the RAM: one number for each member.
    pub homes: SmallVec<[u64; 4]>,
    /// The rate of the guest's time stamp counter in kHz.
    pub tsc_khz: u32,
}

/// A moment on two clocks of one PC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Its time stamp counter.
    pub tsc: Tsc,
    /// Its monotonic clock.
    pub monotonic: Nanos,
}

/// A part of a vCPU's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Whose.
    pub cpu: u8,
    /// Where it begins.
    pub offset: u32,
    /// How long the whole is: [`MOST_STATE`] at most.
    pub total: u32,
}

/// From the console node to a helper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHelper {
    /// Make the partition; the payload says which features its vCPUs have. The answer is [`ToConsole::Created`].
    Create(Create),
    /// The vCPU goes on: the answer to its last [`ToConsole::Exit`]. It is entered for the first time as after an exit
    /// without an answer.
    Enter(u8, VmEntry),
    /// The vCPU finishes what its last entry answered and exits with [`VmExit::Interrupted`].
    Kick(u8),
    /// An interrupt for vCPUs here.
    Interrupt(Targets, Message),
    /// What is to be known of an APIC of another member.
    View(View),
    /// Send the vCPU's state, which is not entered now.
    Save(u8),
    /// Take this state; the payload is a part of it. Parts come in order. A vCPU that was elsewhere is here from now on.
    Restore(Part),
    /// Are you there, and what do your clocks say? A number, and when it was sent.
    Probe(u32, Nanos),
    /// The guest's clock reads so much more than yours, and its time stamp counter so much more than yours, both wrapping.
    Clock {
        /// In nanoseconds.
        nanos: u64,
        /// In ticks.
        tsc: u64,
    },
    /// The guest is over, or this share of it; why.
    End(String),
    /// The vCPU, which is not entered now, is with another member from now on.
    Leave(u8),
}

/// From a helper to the console node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToConsole {
    /// The lease; the payload says which features vCPUs here can have.
    Granted {
        /// Later leases have greater ones.
        epoch: u64,
        /// The rate of this PC's time stamp counter in kHz.
        tsc_khz: u32,
    },
    /// The partition is there.
    Created,
    /// The vCPU left guest code; it waits for an entry, unless it was shut down or failed.
    Exit(u8, VmExit),
    /// An interrupt for vCPUs of the console node.
    Interrupt(Targets, Message),
    /// A level-triggered interrupt was finished.
    Eoi(u8),
    /// A level-triggered interrupt was not taken.
    Refused(u8),
    /// What is to be known of an APIC here.
    View(View),
    /// The vCPU's state; the payload is a part of it. Parts come in order.
    State(Part),
    /// The state was taken.
    Restored(u8),
    /// The answer to a probe: its number, when it was sent, and the clocks here.
    Answer(u32, Nanos, Moment),
    /// This share of the guest cannot go on; why.
    Failed(String),
    /// The vCPU's state was not taken, so that it is where it was; why.
    Untaken(u8, String),
}

/// What is called malformed.
const WHAT: &str = "message about vCPUs";

impl Purpose {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        match self {
            Self::Cpus { holder, count, ram, patience, guest } => {
                out.extend([1, *count]);
                out.extend(holder.to_le_bytes());
                out.extend(ram.to_le_bytes());
                let millis = patience.map_or(0, |patience| (patience.as_millis() as u64).max(1));
                out.extend(millis.to_le_bytes());
                fields::put_text(&mut out, guest, 64);
            }
            Self::Memory { epoch, holder, shard } => {
                out.extend([2, *shard]);
                out.extend(holder.to_le_bytes());
                out.extend(epoch.to_le_bytes());
            }
        }
        out
    }

    /// Reads them.
    ///
    /// # Errors
    /// It is no purpose, or out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes, "purpose of a line");
        let [kind, number] = reader.array()?;
        let holder = reader.u128()?;
        let purpose = match kind {
            1 => {
                let (ram, millis) = (reader.u64()?, reader.u64()?);
                let patience = (millis > 0).then(|| Duration::from_millis(millis));
                Self::Cpus { holder, count: number, ram, patience, guest: reader.text(64)? }
            }
            2 => Self::Memory { epoch: reader.u64()?, holder, shard: number },
            _ => return Err(reader.malformed()),
        };
        let fits = match &purpose {
            Self::Cpus { count, ram, .. } => (1..MOST_CPUS).contains(count) && fits_ram(*ram),
            Self::Memory { shard, .. } => *shard < MOST_SHARDS,
        };
        if fits { reader.end(purpose) } else { Err(reader.malformed()) }
    }
}

fn fits_ram(ram: u64) -> bool {
    (1 << 20..=MOST_RAM).contains(&ram) && ram.is_multiple_of(4096)
}

impl Create {
    /// How many vCPUs the guest has.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// How many members it has.
    #[must_use]
    pub fn members(&self) -> u8 {
        self.counts.len() as u8
    }

    /// Which vCPUs run at the helper when the guest starts.
    #[must_use]
    pub fn here(&self) -> std::ops::Range<u8> {
        let (before, rest) = self.counts.split_at(usize::from(self.member.number()).min(self.counts.len()));
        let first = before.iter().fold(0_u8, |sum, count| sum.saturating_add(*count));
        first..first.saturating_add(rest.first().copied().unwrap_or(0))
    }

    fn put(&self, out: &mut Body) {
        out.extend([self.member.number(), self.members(), self.shards, self.address_bits]);
        out.extend_from_slice(&self.counts);
        out.extend(self.ram.to_le_bytes());
        self.homes.iter().for_each(|pages| out.extend(pages.to_le_bytes()));
        out.extend(self.tsc_khz.to_le_bytes());
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let [member, members, shards, address_bits] = reader.array()?;
        let member = Member::new(member).ok_or_else(|| reader.malformed())?;
        if !(2..=MEMBERS as u8).contains(&members) {
            return Err(reader.malformed());
        }
        let counts = SmallVec::from_slice(reader.take(members.into())?);
        let ram = reader.u64()?;
        let homes = (0..members).map(|_| reader.u64()).collect::<Result<_, _>>()?;
        let tsc_khz = reader.u32()?;
        let cpus: u32 = counts.iter().map(|count| u32::from(*count)).sum();
        let fits = (1..members).contains(&member.number())
            && (1..=MOST_SHARDS).contains(&shards)
            && (32..=52).contains(&address_bits)
            && counts.iter().all(|count| *count > 0)
            && cpus <= MOST_CPUS.into()
            && fits_ram(ram)
            && tsc_khz > 0;
        let create = Self { member, shards, address_bits, counts, ram, homes, tsc_khz };
        if fits { Ok(create) } else { Err(reader.malformed()) }
    }
}

impl ToHelper {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        match self {
            Self::Create(create) => {
                out.push(1);
                create.put(&mut out);
            }
            Self::Enter(cpu, entry) => {
                out.extend([2, *cpu]);
                put_entry(&mut out, *entry);
            }
            Self::Kick(cpu) => out.extend([3, *cpu]),
            Self::Interrupt(targets, message) => {
                out.push(4);
                put_interrupt(&mut out, *targets, *message);
            }
            Self::View(view) => {
                out.push(5);
                put_view(&mut out, *view);
            }
            Self::Save(cpu) => out.extend([6, *cpu]),
            Self::Restore(part) => {
                out.push(7);
                put_part(&mut out, *part);
            }
            Self::Probe(number, at) => {
                out.push(8);
                out.extend(number.to_le_bytes());
                out.extend(at.0.to_le_bytes());
            }
            Self::Clock { nanos, tsc } => {
                out.push(9);
                out.extend(nanos.to_le_bytes());
                out.extend(tsc.to_le_bytes());
            }
            Self::End(why) => {
                out.push(10);
                fields::put_text(&mut out, why, MOST_TEXT);
            }
            Self::Leave(cpu) => out.extend([11, *cpu]),
        }
        out
    }

    /// Reads them.
    ///
    /// # Errors
    /// They are none, or out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes, WHAT);
        let [kind] = reader.array()?;
        let message = match kind {
            1 => Self::Create(Create::take(&mut reader)?),
            2 => Self::Enter(cpu(&mut reader)?, entry(&mut reader)?),
            3 => Self::Kick(cpu(&mut reader)?),
            4 => interrupt(&mut reader).map(|(targets, message)| Self::Interrupt(targets, message))?,
            5 => Self::View(view(&mut reader)?),
            6 => Self::Save(cpu(&mut reader)?),
            7 => Self::Restore(part(&mut reader)?),
            8 => Self::Probe(reader.u32()?, Nanos(reader.u64()?)),
            9 => Self::Clock { nanos: reader.u64()?, tsc: reader.u64()? },
            10 => Self::End(reader.text(MOST_TEXT)?),
            11 => Self::Leave(cpu(&mut reader)?),
            _ => return Err(reader.malformed()),
        };
        reader.end(message)
    }
}

impl ToConsole {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        match self {
            Self::Granted { epoch, tsc_khz } => {
                out.push(1);
                out.extend(epoch.to_le_bytes());
                out.extend(tsc_khz.to_le_bytes());
            }
            Self::Created => out.push(2),
            Self::Exit(cpu, exit) => {
                out.extend([3, *cpu]);
                put_exit(&mut out, exit);
            }
            Self::Interrupt(targets, message) => {
                out.push(4);
                put_interrupt(&mut out, *targets, *message);
            }
            Self::View(view) => {
                out.push(5);
                put_view(&mut out, *view);
            }
            Self::Eoi(vector) => out.extend([6, *vector]),
            Self::Refused(vector) => out.extend([7, *vector]),
            Self::State(part) => {
                out.push(8);
                put_part(&mut out, *part);
            }
            Self::Restored(cpu) => out.extend([9, *cpu]),
            Self::Answer(number, at, Moment { tsc, monotonic }) => {
                out.push(10);
                out.extend(number.to_le_bytes());
                out.extend(at.0.to_le_bytes());
                out.extend(tsc.0.to_le_bytes());
                out.extend(monotonic.0.to_le_bytes());
            }
            Self::Failed(why) => {
                out.push(11);
                fields::put_text(&mut out, why, MOST_TEXT);
            }
            Self::Untaken(cpu, why) => {
                out.extend([12, *cpu]);
                fields::put_text(&mut out, why, MOST_TEXT);
            }
        }
        out
    }

    /// Reads them.
    ///
    /// # Errors
    /// They are none, or out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes, WHAT);
        let [kind] = reader.array()?;
        let message = match kind {
            1 => Self::Granted { epoch: reader.u64()?, tsc_khz: reader.u32()? },
            2 => Self::Created,
            3 => Self::Exit(cpu(&mut reader)?, exit(&mut reader)?),
            4 => interrupt(&mut reader).map(|(targets, message)| Self::Interrupt(targets, message))?,
            5 => Self::View(view(&mut reader)?),
            6 => Self::Eoi(byte(&mut reader)?),
            7 => Self::Refused(byte(&mut reader)?),
            8 => Self::State(part(&mut reader)?),
            9 => Self::Restored(cpu(&mut reader)?),
            10 => {
                let (number, at) = (reader.u32()?, Nanos(reader.u64()?));
                Self::Answer(number, at, Moment { tsc: Tsc(reader.u64()?), monotonic: Nanos(reader.u64()?) })
            }
            11 => Self::Failed(reader.text(MOST_TEXT)?),
            12 => Self::Untaken(cpu(&mut reader)?, reader.text(MOST_TEXT)?),
            _ => return Err(reader.malformed()),
        };
        reader.end(message)
    }
}

fn byte(reader: &mut Reader<'_>) -> Result<u8, Malformed> {
    reader.array().map(|[byte]| byte)
}

fn cpu(reader: &mut Reader<'_>) -> Result<u8, Malformed> {
    let cpu = byte(reader)?;
    if cpu < MOST_CPUS { Ok(cpu) } else { Err(reader.malformed()) }
}

/// Its length, and the bytes.
fn put_data(out: &mut Body, data: &Data) {
    out.push(data.as_slice().len() as u8);
    out.extend_from_slice(data.as_slice());
}

fn data(reader: &mut Reader<'_>, most: u8) -> Result<Data, Malformed> {
    let len = byte(reader)?;
    if len > most {
        return Err(reader.malformed());
    }
    Ok(Data::new(reader.take(len.into())?, len.into()))
}

fn put_entry(out: &mut Body, entry: VmEntry) {
    match entry {
        VmEntry::Continue => out.push(0),
        VmEntry::Read(data) => {
            out.push(1);
            put_data(out, &data);
        }
    }
}

fn entry(reader: &mut Reader<'_>) -> Result<VmEntry, Malformed> {
    match byte(reader)? {
        0 => Ok(VmEntry::Continue),
        1 => data(reader, 8).map(VmEntry::Read),
        _ => Err(reader.malformed()),
    }
}

fn put_exit(out: &mut Body, exit: &VmExit) {
    match exit {
        VmExit::PortRead { port, size } => {
            out.push(1);
            out.extend(port.to_le_bytes());
            out.push(*size);
        }
        VmExit::PortWrite { port, data } => {
            out.push(2);
            out.extend(port.to_le_bytes());
            put_data(out, data);
        }
        VmExit::MmioRead { address, size } => {
            out.push(3);
            out.extend(address.to_le_bytes());
            out.push(*size);
        }
        VmExit::MmioWrite { address, data } => {
            out.push(4);
            out.extend(address.to_le_bytes());
            put_data(out, data);
        }
        VmExit::Interrupted => out.push(5),
        VmExit::Halted => out.push(6),
        VmExit::TripleFault => out.push(7),
        VmExit::Failed(why) => {
            out.push(8);
            fields::put_text(out, why, MOST_TEXT);
        }
    }
}

fn exit(reader: &mut Reader<'_>) -> Result<VmExit, Malformed> {
    let size = |reader: &mut Reader<'_>, most: u8| match byte(reader)? {
        size if (1..=most).contains(&size) => Ok(size),
        _ => Err(reader.malformed()),
    };
    let some = |reader: &mut Reader<'_>, most: u8| match data(reader, most)? {
        data if !data.as_slice().is_empty() => Ok(data),
        _ => Err(reader.malformed()),
    };
    let port = |reader: &mut Reader<'_>| reader.array().map(u16::from_le_bytes);
    Ok(match byte(reader)? {
        1 => VmExit::PortRead { port: port(reader)?, size: size(reader, 4)? },
        2 => VmExit::PortWrite { port: port(reader)?, data: some(reader, 4)? },
        3 => VmExit::MmioRead { address: reader.u64()?, size: size(reader, 8)? },
        4 => VmExit::MmioWrite { address: reader.u64()?, data: some(reader, 8)? },
        5 => VmExit::Interrupted,
        6 => VmExit::Halted,
        7 => VmExit::TripleFault,
        8 => VmExit::Failed(reader.text(MOST_TEXT)?),
        _ => return Err(reader.malformed()),
    })
}

/// Flags of a message: level-triggered, asserted.
const LEVEL: u8 = 1;
const ASSERTED: u8 = 2;

fn put_interrupt(out: &mut Body, targets: Targets, message: Message) {
    let (kind, id) = match message.destination {
        Destination::Physical(ApicId(id)) => (0, id),
        Destination::Logical(id) => (1, id),
        Destination::Itself(ApicId(id)) => (2, id),
        Destination::All => (3, 0),
        Destination::AllBut(ApicId(id)) => (4, id),
    };
    let delivery = match message.delivery {
        Delivery::Fixed => 0,
        Delivery::LowestPriority => 1,
        Delivery::Smi => 2,
        Delivery::Nmi => 4,
        Delivery::Init => 5,
        Delivery::StartUp => 6,
        Delivery::External => 7,
    };
    let level = if message.trigger == Trigger::Level { LEVEL } else { 0 };
    let asserted = if message.asserted { ASSERTED } else { 0 };
    out.extend([kind, id, delivery, message.vector, level | asserted]);
    let mut map = [0u8; 32];
    for ApicId(id) in targets.iter() {
        map[usize::from(id / 8)] |= 1 << (id % 8);
    }
    out.extend(map);
}

fn interrupt(reader: &mut Reader<'_>) -> Result<(Targets, Message), Malformed> {
    let [kind, id, delivery, vector, flags] = reader.array()?;
    let destination = match (kind, id) {
        (0, _) => Destination::Physical(ApicId(id)),
        (1, _) => Destination::Logical(id),
        (2, _) => Destination::Itself(ApicId(id)),
        (3, 0) => Destination::All,
        (4, _) => Destination::AllBut(ApicId(id)),
        _ => return Err(reader.malformed()),
    };
    let delivery = match delivery {
        0 => Delivery::Fixed,
        1 => Delivery::LowestPriority,
        2 => Delivery::Smi,
        4 => Delivery::Nmi,
        5 => Delivery::Init,
        6 => Delivery::StartUp,
        7 => Delivery::External,
        _ => return Err(reader.malformed()),
    };
    if flags & !(LEVEL | ASSERTED) != 0 {
        return Err(reader.malformed());
    }
    let trigger = if flags & LEVEL != 0 { Trigger::Level } else { Trigger::Edge };
    let map: [u8; 32] = reader.array()?;
    let has = |id: u8| map[usize::from(id / 8)] & 1 << (id % 8) != 0;
    let targets: Targets = (0..=u8::MAX).filter(|id| has(*id)).map(ApicId).collect();
    Ok((targets, Message { destination, delivery, vector, trigger, asserted: flags & ASSERTED != 0 }))
}

fn put_view(out: &mut Body, view: View) {
    let View { id, ldr, dfr, tpr, enabled } = view;
    out.extend([id.0, ldr, dfr, tpr, u8::from(enabled)]);
}

fn view(reader: &mut Reader<'_>) -> Result<View, Malformed> {
    let [id, ldr, dfr, tpr, enabled] = reader.array()?;
    if id >= MOST_CPUS || enabled > 1 {
        return Err(reader.malformed());
    }
    Ok(View { id: ApicId(id), ldr, dfr, tpr, enabled: enabled == 1 })
}

fn put_part(out: &mut Body, part: Part) {
    out.push(part.cpu);
    out.extend(part.offset.to_le_bytes());
    out.extend(part.total.to_le_bytes());
}

fn part(reader: &mut Reader<'_>) -> Result<Part, Malformed> {
    let part = Part { cpu: cpu(reader)?, offset: reader.u32()?, total: reader.u32()? };
    if part.total > MOST_STATE || part.offset >= part.total { Err(reader.malformed()) } else { Ok(part) }
}

/// Bytes from a peer: what is read is what is written.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    if let Ok(purpose) = Purpose::decode(data) {
        assert_eq!(purpose.encode().as_slice(), data);
    }
    if let Ok(message) = ToHelper::decode(data) {
        assert_eq!(message.encode().as_slice(), data);
    }
    if let Ok(message) = ToConsole::decode(data) {
        assert_eq!(message.encode().as_slice(), data);
    }
}

#[cfg(test)]
#[path = "protocol_test.rs"]
mod tests;
