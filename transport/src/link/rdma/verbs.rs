//! The verbs of libibverbs, as types that free what they hold. All of this crate's calls into it are here.
//!
//! What belongs to a device is freed in the order that the library wants: the queue pair, then memory and the
//! completion queue, then the domain, then the device. Each connection has a device context and a protection
//! domain of its own, so its keys open nothing of another connection.
#![allow(unsafe_code)] // libibverbs is C

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rdma_sys as ibv;

use super::cache::Cache;
use super::queue::{Done, Keys, Queue, SLOTS, Transfer, WORKS, Work};
use crate::buffer::{Buffer, Region};
use crate::sessions::random;
use crate::wire::rdma::{Place, SLOT};

/// Bytes that one connection keeps registered, besides its slots.
const REGISTERED: usize = 64 << 20;

/// READs that a side has under way, or answers, at once.
const READS: u8 = 16;

/// How long a packet waits for its acknowledgement: 4.096 µs × 2ⁿ, about a seventh of a second.
const TIMEOUT: u8 = 15;

/// How often a packet is sent again before the connection counts as broken.
const RETRIES: u8 = 6;

/// The kind of a global identifier that is an IP address in UDP packets (`ib_uverbs_gid_type`).
const ROCE_V2: u32 = 2;

/// A port on Ethernet (`IBV_LINK_LAYER_ETHERNET`).
const ETHERNET: u8 = 2;

unsafe extern "C" {
    /// From libibverbs 1.11 on; `ibv_query_gid_table` of the header calls it.
    fn _ibv_query_gid_table(
        context: *mut ibv::ibv_context,
        entries: *mut ibv::ibv_gid_entry,
        most: usize,
        flags: u32,
        size: usize,
    ) -> isize;
}

fn last() -> io::Error {
    io::Error::last_os_error()
}

/// What a verb that returns an error number says.
fn said(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// An open device.
struct Device(NonNull<ibv::ibv_context>);

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: it was opened, and what was made with it is gone.
        unsafe { ibv::ibv_close_device(self.0.as_ptr()) };
    }
}

/// A port of a device, and how it is addressed.
#[derive(Clone, Copy)]
struct Port {
    number: u8,
    gid: [u8; 16],
    gid_index: u8,
    lid: u16,
    mtu: u8,
    infiniband: bool,
}

impl Device {
    /// The devices of this PC, by name.
    fn all() -> io::Result<Vec<(String, Self)>> {
        let mut count = 0;
        // SAFETY: the list is freed below; each entry is a device until then.
        let list = unsafe { ibv::ibv_get_device_list(&raw mut count) };
        if list.is_null() {
            return Err(last());
        }
        let mut found = Vec::new();
        for at in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` entries, and names are strings that live as long as it.
            let (name, context) = unsafe {
                let device = *list.add(at);
                let name = CStr::from_ptr(ibv::ibv_get_device_name(device)).to_string_lossy().into_owned();
                (name, ibv::ibv_open_device(device))
            };
            // One that cannot be opened (no right to) is as good as none.
            found.extend(NonNull::new(context).map(|context| (name, Self(context))));
        }
        // SAFETY: it came from `ibv_get_device_list`; open devices outlive it.
        unsafe { ibv::ibv_free_device_list(list) };
        Ok(found)
    }

    fn attributes(&self) -> io::Result<ibv::ibv_device_attr> {
        let mut attributes = MaybeUninit::zeroed();
        // SAFETY: the device is open, and the attributes have room; all zeros is valid for them.
        said(unsafe { ibv::ibv_query_device(self.0.as_ptr(), attributes.as_mut_ptr()) })?;
        // SAFETY: see above.
        Ok(unsafe { attributes.assume_init() })
    }

    fn port(&self, number: u8) -> io::Result<ibv::ibv_port_attr> {
        let mut attributes = MaybeUninit::zeroed();
        // SAFETY: as above.
        said(unsafe { ibv::___ibv_query_port(self.0.as_ptr(), number, attributes.as_mut_ptr()) })?;
        // SAFETY: see above.
        Ok(unsafe { attributes.assume_init() })
    }

    /// The ports' global identifiers.
    fn gids(&self) -> Vec<ibv::ibv_gid_entry> {
        const MOST: usize = 1024;
        let mut entries: Vec<ibv::ibv_gid_entry> = Vec::with_capacity(MOST);
        let size = size_of::<ibv::ibv_gid_entry>();
        // SAFETY: there is room for `MOST` entries; the library fills as many as it returns.
        unsafe {
            let count = _ibv_query_gid_table(self.0.as_ptr(), entries.as_mut_ptr(), MOST, 0, size);
            entries.set_len(usize::try_from(count).unwrap_or(0).min(MOST));
        }
        entries
    }

    /// The active port that has the address `local`: on RoCE as its identifier, packets in UDP first. On
    /// InfiniBand, whose identifiers are not IP addresses, the first active port.
    fn port_of(&self, local: IpAddr) -> Option<Port> {
        let wanted = match local.to_canonical() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let mut gids = self.gids();
        gids.sort_by_key(|entry| entry.gid_type != ROCE_V2);
        let ports = self.attributes().map_or(0, |attributes| attributes.phys_port_cnt);
        for number in 1..=ports {
            let Ok(attributes) = self.port(number) else { continue };
            if attributes.state != ibv::ibv_port_state::IBV_PORT_ACTIVE {
                continue;
            }
            let infiniband = attributes.link_layer != ETHERNET;
            let here = gids.iter().filter(|entry| entry.port_num == u32::from(number));
            // SAFETY: every byte pattern is an identifier.
            let gid = |entry: &ibv::ibv_gid_entry| unsafe { entry.gid.raw };
            let mut fits = here.filter(|entry| infiniband || gid(entry) == wanted);
            let Some(entry) = fits.next() else { continue };
            let Ok(gid_index) = u8::try_from(entry.gid_index) else { continue };
            let mtu = u8::try_from(attributes.active_mtu).unwrap_or(1).clamp(1, 5);
            let gid = gid(entry);
            return Some(Port { number, gid, gid_index, lid: attributes.lid, mtu, infiniband });
        }
        None
    }
}

/// A protection domain: keys of one open nothing of another.
struct Domain(NonNull<ibv::ibv_pd>);

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: it was made, and what was made in it is gone.
        unsafe { ibv::ibv_dealloc_pd(self.0.as_ptr()) };
    }
}

/// Memory that the device may reach.
struct Memory(NonNull<ibv::ibv_mr>);

// SAFETY: libibverbs may be called from any thread; the pointer is used only by who owns this.
unsafe impl Send for Memory {}

impl Memory {
    /// # Safety
    /// The region must stay mapped until this is dropped, and nobody may hold references into it.
    unsafe fn new(domain: &Domain, base: usize, len: usize, remote: bool) -> io::Result<Self> {
        use ibv::ibv_access_flags as flags;
        let mut access = flags::IBV_ACCESS_LOCAL_WRITE;
        if remote {
            access = access | flags::IBV_ACCESS_REMOTE_READ | flags::IBV_ACCESS_REMOTE_WRITE;
        }
        // SAFETY: the caller keeps the memory.
        let memory =
            unsafe { ibv::ibv_reg_mr(domain.0.as_ptr(), base as *mut _, len, access.0 as libc::c_int) };
        NonNull::new(memory).map(Self).ok_or_else(last)
    }

    fn keys(&self) -> Keys {
        // SAFETY: it is registered.
        let memory = unsafe { self.0.as_ref() };
        Keys { local: memory.lkey, remote: memory.rkey }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was registered; when the call returns, the device does not reach it any more.
        unsafe { ibv::ibv_dereg_mr(self.0.as_ptr()) };
    }
}

/// Where completions become readable.
struct Bell(NonNull<ibv::ibv_comp_channel>);

impl Drop for Bell {
    fn drop(&mut self) {
        // SAFETY: it was made, and its completion queue is gone.
        unsafe { ibv::ibv_destroy_comp_channel(self.0.as_ptr()) };
    }
}

/// A completion queue.
struct Completions(NonNull<ibv::ibv_cq>);

impl Drop for Completions {
    fn drop(&mut self) {
        // SAFETY: it was made, its queue pair is gone and its events are acknowledged.
        unsafe { ibv::ibv_destroy_cq(self.0.as_ptr()) };
    }
}

/// A reliable connection.
struct Pair(NonNull<ibv::ibv_qp>);

impl Pair {
    fn modify(&self, attributes: &mut ibv::ibv_qp_attr, mask: ibv::ibv_qp_attr_mask) -> io::Result<()> {
        // SAFETY: it is there, and the attributes under the mask are set.
        said(unsafe { ibv::ibv_modify_qp(self.0.as_ptr(), attributes, mask.0 as libc::c_int) })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: it was made. When the call returns, the device neither takes nor answers anything for it.
        unsafe { ibv::ibv_destroy_qp(self.0.as_ptr()) };
    }
}

/// A queue pair of a device. Fields are dropped in their order.
pub(super) struct Endpoint {
    pair: Pair,
    cache: Cache<Memory>,
    sending: Memory,
    receiving: Memory,
    completions: Completions,
    bell: Bell,
    domain: Domain,
    device: Device,
    /// The memory of `sending` and `receiving`; last, since the device reaches it until those are gone.
    slots: Buffer,
    port: Port,
    place: Place,
    remote: bool,
    wrs: Vec<ibv::ibv_send_wr>,
    sges: Vec<ibv::ibv_sge>,
}

// SAFETY: libibverbs may be called from any thread, and the pointers are used only by who owns this.
unsafe impl Send for Endpoint {}

/// What an operation of the receive queue is tagged with, besides its slot.
const RECEIVE: u64 = 1 << 32;

/// Makes a queue pair at the port that has the address `local`; `remote`: the other side is to reach memory
/// that is registered with it.
///
/// # Errors
/// There is no such port, or the device refuses; in words.
pub(super) fn open(local: IpAddr, remote: bool) -> Result<Endpoint, String> {
    let devices = Device::all().map_err(|e| format!("the list of RDMA devices cannot be read: {e}"))?;
    if devices.is_empty() {
        return Err("this PC has no RDMA device".to_owned());
    }
    let names: Vec<String> = devices.iter().map(|(name, _)| name.clone()).collect();
    let found = devices.into_iter().find_map(|(name, device)| Some((name, device.port_of(local)?, device)));
    let Some((name, port, device)) = found else {
        return Err(format!("no active port of {} has the address {local}", names.join(", ")));
    };
    Endpoint::new(device, port, remote).map_err(|e| format!("the RDMA device {name} refuses: {e}"))
}

impl Endpoint {
    fn new(device: Device, port: Port, remote: bool) -> io::Result<Self> {
        let attributes = device.attributes()?;
        // SAFETY: the device is open.
        let domain = unsafe { ibv::ibv_alloc_pd(device.0.as_ptr()) };
        let domain = Domain(NonNull::new(domain).ok_or_else(last)?);
        // SAFETY: as above.
        let bell = unsafe { ibv::ibv_create_comp_channel(device.0.as_ptr()) };
        let bell = Bell(NonNull::new(bell).ok_or_else(last)?);
        // SAFETY: both are open while `bell` and `device` live.
        let fds = unsafe { [bell.0.as_ref().fd, device.0.as_ref().async_fd] };
        for fd in fds {
            // SAFETY: as above.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        let entries = WORKS as libc::c_int + libc::c_int::from(SLOTS) + 16;
        // SAFETY: device and channel are there and outlive the queue.
        let completions =
            unsafe { ibv::ibv_create_cq(device.0.as_ptr(), entries, null_mut(), bell.0.as_ptr(), 0) };
        let completions = Completions(NonNull::new(completions).ok_or_else(last)?);
        let half = usize::from(SLOTS) * SLOT;
        let slots = Buffer::zeroed(2 * half);
        let base = slots.iovecs().first().map_or(0, |v| v.iov_base as usize);
        // SAFETY: `slots` is dropped after both.
        let (sending, receiving) = unsafe {
            (Memory::new(&domain, base, half, false)?, Memory::new(&domain, base + half, half, false)?)
        };
        let pair = Self::pair(&domain, &completions)?;
        // SAFETY: it is there.
        let number = unsafe { pair.0.as_ref().qp_num };
        let reads = |device: libc::c_int| u8::try_from(device).unwrap_or(READS).min(READS);
        let place = Place {
            gid: port.gid,
            queue_pair: number,
            packet: random() as u32 & 0x00ff_ffff,
            lid: port.lid,
            mtu: port.mtu,
            infiniband: port.infiniband,
            reads: reads(attributes.max_qp_rd_atom),
            slots: SLOTS,
            slot: SLOT as u32,
        };
        let cache = Cache::new(REGISTERED);
        let (wrs, sges) = (Vec::new(), Vec::new());
        let mut endpoint = Self {
            pair,
            cache,
            sending,
            receiving,
            completions,
            bell,
            domain,
            device,
            slots,
            port,
            place,
            remote,
            wrs,
            sges,
        };
        endpoint.initialise()?;
        for slot in 0..SLOTS {
            endpoint.repost(slot)?;
        }
        Ok(endpoint)
    }

    fn pair(domain: &Domain, completions: &Completions) -> io::Result<Pair> {
        // SAFETY: all zeros is a valid value.
        let mut wanted: ibv::ibv_qp_init_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        (wanted.send_cq, wanted.recv_cq) = (completions.0.as_ptr(), completions.0.as_ptr());
        wanted.qp_type = ibv::ibv_qp_type::IBV_QPT_RC;
        wanted.cap.max_send_wr = WORKS;
        wanted.cap.max_recv_wr = u32::from(SLOTS);
        (wanted.cap.max_send_sge, wanted.cap.max_recv_sge) = (1, 1);
        // SAFETY: domain and queue are there and outlive the pair.
        let pair = unsafe { ibv::ibv_create_qp(domain.0.as_ptr(), &raw mut wanted) };
        NonNull::new(pair).map(Pair).ok_or_else(last)
    }

    fn attributes(state: ibv::ibv_qp_state::Type) -> ibv::ibv_qp_attr {
        // SAFETY: all zeros is a valid value.
        let mut attributes: ibv::ibv_qp_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        attributes.qp_state = state;
        attributes
    }

    fn initialise(&self) -> io::Result<()> {
        use ibv::{ibv_access_flags as access, ibv_qp_attr_mask as mask};
        let mut attributes = Self::attributes(ibv::ibv_qp_state::IBV_QPS_INIT);
        attributes.port_num = self.port.number;
        if self.remote {
            attributes.qp_access_flags = (access::IBV_ACCESS_REMOTE_READ | access::IBV_ACCESS_REMOTE_WRITE).0;
        }
        let set =
            mask::IBV_QP_STATE | mask::IBV_QP_PKEY_INDEX | mask::IBV_QP_PORT | mask::IBV_QP_ACCESS_FLAGS;
        self.pair.modify(&mut attributes, set)
    }

    /// Connects to the other side's queue pair. The kernel may look up its hardware address and wait.
    ///
    /// # Errors
    /// The device refuses, or the address is not to be found; in words.
    pub(super) fn connect(&mut self, other: &Place) -> Result<(), String> {
        if other.infiniband != self.place.infiniband {
            return Err("one side is on InfiniBand, the other on Ethernet".to_owned());
        }
        self.steps(other).map_err(|e| format!("the queue pair cannot be connected: {e}"))
    }

    fn steps(&mut self, other: &Place) -> io::Result<()> {
        use ibv::ibv_qp_attr_mask as mask;
        let mut ready = Self::attributes(ibv::ibv_qp_state::IBV_QPS_RTR);
        ready.path_mtu = self.place.mtu.min(other.mtu).into();
        ready.dest_qp_num = other.queue_pair;
        ready.rq_psn = other.packet;
        ready.max_dest_rd_atomic = self.place.reads;
        ready.min_rnr_timer = 12;
        ready.ah_attr.port_num = self.port.number;
        ready.ah_attr.dlid = other.lid;
        ready.ah_attr.is_global = u8::from(!self.place.infiniband);
        ready.ah_attr.grh.dgid = ibv::ibv_gid { raw: other.gid };
        ready.ah_attr.grh.sgid_index = self.port.gid_index;
        ready.ah_attr.grh.hop_limit = 64;
        let set = mask::IBV_QP_STATE
            | mask::IBV_QP_AV
            | mask::IBV_QP_PATH_MTU
            | mask::IBV_QP_DEST_QPN
            | mask::IBV_QP_RQ_PSN
            | mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | mask::IBV_QP_MIN_RNR_TIMER;
        self.pair.modify(&mut ready, set)?;
        let mut send = Self::attributes(ibv::ibv_qp_state::IBV_QPS_RTS);
        (send.timeout, send.retry_cnt, send.rnr_retry) = (TIMEOUT, RETRIES, RETRIES);
        send.sq_psn = self.place.packet;
        let most = self.device.attributes()?.max_qp_init_rd_atom;
        send.max_rd_atomic = u8::try_from(most).unwrap_or(READS).min(READS).min(other.reads);
        let set = mask::IBV_QP_STATE
            | mask::IBV_QP_TIMEOUT
            | mask::IBV_QP_RETRY_CNT
            | mask::IBV_QP_RNR_RETRY
            | mask::IBV_QP_SQ_PSN
            | mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.pair.modify(&mut send, set)
    }

    /// As what the link uses.
    pub(super) fn boxed(self) -> Box<dyn Queue> {
        Box::new(self)
    }

    fn base(&self) -> *mut u8 {
        self.slots.iovecs().first().map_or(null_mut(), |v| v.iov_base.cast())
    }

    /// The request for `work`, and the local memory it names.
    fn request(&self, work: Work, ends: bool) -> (ibv::ibv_send_wr, ibv::ibv_sge) {
        use ibv::ibv_wr_opcode as opcode;
        // SAFETY: all zeros is a valid value.
        let mut wr: ibv::ibv_send_wr = unsafe { MaybeUninit::zeroed().assume_init() };
        wr.num_sge = 1;
        wr.send_flags = if ends { ibv::ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
        let sge = match work {
            Work::Send { slot, len } => {
                wr.opcode = opcode::IBV_WR_SEND;
                let addr = self.base() as u64 + u64::from(slot) * SLOT as u64;
                ibv::ibv_sge { addr, length: len.min(SLOT as u32), lkey: self.sending.keys().local }
            }
            Work::Read(transfer) | Work::Write(transfer) => {
                let read = matches!(work, Work::Read(_));
                wr.opcode = if read { opcode::IBV_WR_RDMA_READ } else { opcode::IBV_WR_RDMA_WRITE };
                let Transfer { local, local_key, len, remote, remote_key } = transfer;
                wr.wr.rdma = ibv::rdma_t { remote_addr: remote, rkey: remote_key };
                ibv::ibv_sge { addr: local, length: len, lkey: local_key }
            }
        };
        (wr, sge)
    }
}

impl Queue for Endpoint {
    fn place(&self) -> Place {
        self.place
    }

    fn slot(&mut self, slot: u16) -> &mut [u8] {
        let at = usize::from(slot.min(SLOTS - 1)) * SLOT;
        // SAFETY: the slot lies in the first half of `slots`, lives as long as `self`, and the device only
        // reads it, and only while it is under way.
        unsafe { std::slice::from_raw_parts_mut(self.base().add(at), SLOT) }
    }

    fn received(&self, slot: u16, len: u32) -> &[u8] {
        let at = usize::from(SLOTS + slot.min(SLOTS - 1)) * SLOT;
        // SAFETY: the slot lies in the second half of `slots`; the device filled it and does not touch it
        // again before it is reposted, for which `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts(self.base().add(at), (len as usize).min(SLOT)) }
    }

    fn repost(&mut self, slot: u16) -> io::Result<()> {
        let slot = slot.min(SLOTS - 1);
        let addr = self.base() as u64 + u64::from(SLOTS + slot) * SLOT as u64;
        let mut sge = ibv::ibv_sge { addr, length: SLOT as u32, lkey: self.receiving.keys().local };
        let wr_id = RECEIVE | u64::from(slot);
        let mut wr = ibv::ibv_recv_wr { wr_id, next: null_mut(), sg_list: &raw mut sge, num_sge: 1 };
        let mut bad = null_mut();
        // SAFETY: the pair is there; the slot's memory is registered and outlives it.
        said(unsafe { ibv::ibv_post_recv(self.pair.0.as_ptr(), &raw mut wr, &raw mut bad) })
    }

    fn post(&mut self, works: &[(Work, bool)]) -> io::Result<()> {
        if works.is_empty() {
            return Ok(());
        }
        self.wrs.clear();
        self.sges.clear();
        for (work, ends) in works {
            let (wr, sge) = self.request(*work, *ends);
            self.wrs.push(wr);
            self.sges.push(sge);
        }
        let (first, sges) = (self.wrs.as_mut_ptr(), self.sges.as_mut_ptr());
        for (at, wr) in self.wrs.iter_mut().enumerate() {
            wr.sg_list = sges.wrapping_add(at);
            wr.next = if at + 1 < works.len() { first.wrapping_add(at + 1) } else { null_mut() };
        }
        let mut bad = null_mut();
        // SAFETY: requests and lists live through the call. The memory that they name is registered with
        // this pair; who posts keeps it until the group is done or the pair is dropped.
        said(unsafe { ibv::ibv_post_send(self.pair.0.as_ptr(), first, &raw mut bad) })
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        const BATCH: usize = 32;
        let mut batch = [const { MaybeUninit::<ibv::ibv_wc>::uninit() }; BATCH];
        loop {
            // SAFETY: the batch has room for as many as are asked for; as many are filled as are returned.
            let count = unsafe {
                ibv::ibv_poll_cq(self.completions.0.as_ptr(), BATCH as i32, batch.as_mut_ptr().cast())
            };
            let Ok(count) = usize::try_from(count) else {
                return done.push(Done::Failed("the completion queue failed".to_owned()));
            };
            for completion in batch.iter().take(count) {
                // SAFETY: it was filled.
                let completion = unsafe { completion.assume_init_ref() };
                let slot = u16::try_from(completion.wr_id & !RECEIVE).unwrap_or(0);
                done.push(if completion.status != ibv::ibv_wc_status::IBV_WC_SUCCESS {
                    // SAFETY: the library has a string for every status, and one for those it does not know.
                    let what = unsafe { CStr::from_ptr(ibv::ibv_wc_status_str(completion.status)) };
                    Done::Failed(what.to_string_lossy().into_owned())
                } else if completion.wr_id & RECEIVE != 0 {
                    Done::Received { slot, len: completion.byte_len }
                } else {
                    Done::Group
                });
            }
            if count < BATCH {
                break;
            }
        }
    }

    fn notify(&mut self) -> io::Result<()> {
        // SAFETY: the queue is there.
        said(unsafe { ibv::ibv_req_notify_cq(self.completions.0.as_ptr(), 0) })
    }

    fn completions(&self) -> RawFd {
        // SAFETY: the channel is there.
        unsafe { self.bell.0.as_ref().fd }
    }

    fn woken(&mut self) {
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is there and does not block; the event is acknowledged at once, as dropping
        // the queue requires.
        unsafe {
            if ibv::ibv_get_cq_event(self.bell.0.as_ptr(), &raw mut queue, &raw mut context) == 0 {
                ibv::ibv_ack_cq_events(queue, 1);
            }
        }
    }

    fn events(&self) -> RawFd {
        // SAFETY: the device is open.
        unsafe { self.device.0.as_ref().async_fd }
    }

    fn take_event(&mut self) -> Option<String> {
        use ibv::ibv_event_type as event;
        let mut taken = MaybeUninit::<ibv::ibv_async_event>::zeroed();
        // SAFETY: the device is open and the descriptor does not block; an event that was got is
        // acknowledged. Its kind is read as a number: the kernel may know more kinds than the library.
        let kind = unsafe {
            if ibv::ibv_get_async_event(self.device.0.as_ptr(), taken.as_mut_ptr()) != 0 {
                return None;
            }
            let kind = (&raw const (*taken.as_ptr()).event_type).cast::<u32>().read();
            ibv::ibv_ack_async_event(taken.as_mut_ptr());
            kind
        };
        let is = |one: event| kind == one as u32;
        let what = match () {
            () if is(event::IBV_EVENT_DEVICE_FATAL) => "the RDMA device is gone",
            () if is(event::IBV_EVENT_PORT_ERR) => "the RDMA port lost its link",
            () if is(event::IBV_EVENT_QP_FATAL) || is(event::IBV_EVENT_CQ_ERR) => "the RDMA device failed",
            () if is(event::IBV_EVENT_QP_REQ_ERR) || is(event::IBV_EVENT_QP_ACCESS_ERR) => {
                "the other side asked the RDMA device for what it may not have"
            }
            () => return None,
        };
        Some(what.to_owned())
    }

    fn register(&mut self, region: &Arc<Region>) -> Option<Keys> {
        let (domain, remote) = (&self.domain, self.remote);
        // SAFETY: the cache keeps the region, which keeps its memory, until the registration is dropped.
        let register =
            |region: &Region| unsafe { Memory::new(domain, region.base(), region.len(), remote).ok() };
        self.cache.get(region, register).map(Memory::keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pc_without_a_fitting_device_says_so() {
        let Err(why) = open("192.0.2.1".parse().expect("an address"), true) else {
            panic!("no port has an address that is for documentation only");
        };
        assert!(why.contains("no RDMA device") || why.contains("192.0.2.1") || why.contains("list"), "{why}");
    }
}
