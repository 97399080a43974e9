//! Linux's own way to have memory elsewhere: a network block device as swap space. The device's server is as plain
//! as can be, one thread and one mapping. It speaks NBD's transmission phase only, which is all that the kernel's
//! client needs.
#![allow(unsafe_code)] // The kernel's client is set up by ioctls.

use std::fs::{File, OpenOptions, read_to_string, write};
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;

const NBD_SET_SOCK: libc::c_ulong = 0xab00;
const NBD_SET_BLKSIZE: libc::c_ulong = 0xab01;
const NBD_DO_IT: libc::c_ulong = 0xab03;
const NBD_SET_SIZE_BLOCKS: libc::c_ulong = 0xab07;
const NBD_DISCONNECT: libc::c_ulong = 0xab08;
const BLOCK: u64 = 4096;

const DEVICE: &str = "/dev/nbd0";
const GROUP: &str = "/sys/fs/cgroup/bench-swap";

/// Serves `size` bytes of memory to one client after the other.
///
/// # Errors
/// The listener fails.
pub fn serve(listener: &TcpListener, size: usize) -> Result<()> {
    let mut memory = vec![0; size];
    loop {
        let (socket, _) = listener.accept()?;
        socket.set_nodelay(true)?;
        if let Err(why) = answer(&socket, &mut memory) {
            eprintln!("bench: a client of the network block device left: {why}");
        }
    }
}

fn answer(socket: &TcpStream, memory: &mut [u8]) -> std::io::Result<()> {
    let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let mut from = BufReader::with_capacity(64 << 10, socket);
    let mut to = socket;
    let mut answer = Vec::with_capacity(1 << 20);
    let mut request = [0; 28];
    loop {
        from.read_exact(&mut request)?;
        let number =
            |at: usize| u32::from_be_bytes([request[at], request[at + 1], request[at + 2], request[at + 3]]);
        let (offset, len) = (u64::from(number(16)) << 32 | u64::from(number(20)), number(24) as usize);
        if number(0) != REQUEST {
            return Err(invalid());
        }
        answer.clear();
        answer.extend_from_slice(&REPLY.to_be_bytes());
        answer.extend_from_slice(&0_u32.to_be_bytes());
        answer.extend_from_slice(&request[8..16]);
        let part =
            usize::try_from(offset).ok().and_then(|start| memory.get_mut(start..start.checked_add(len)?));
        match (number(4) & 0xffff) as u16 {
            READ => answer.extend_from_slice(part.ok_or_else(invalid)?),
            WRITE => from.read_exact(part.ok_or_else(invalid)?)?,
            DISCONNECT => return Ok(()),
            _ => {}
        }
        to.write_all(&answer)?;
    }
}

/// Swap space on a network block device. Dropping it takes it out of use.
pub struct Swap {
    device: File,
}

impl Swap {
    /// Swaps to the server at `address`, which has `size` bytes, and to nothing else.
    ///
    /// # Errors
    /// The kernel lacks NBD, or a tool is missing.
    pub fn on(address: &str, size: u64) -> Result<Self> {
        let _ = Command::new("modprobe").arg("nbd").status(); // it may be built in
        let missing = "this kernel has no network block devices (nbd)";
        let device = OpenOptions::new().read(true).write(true).open(DEVICE).context(missing)?;
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        set(&device, NBD_SET_BLKSIZE, BLOCK)?;
        set(&device, NBD_SET_SIZE_BLOCKS, size / BLOCK)?;
        set(&device, NBD_SET_SOCK, socket.as_raw_fd() as u64)?;
        let worker = device.try_clone()?;
        std::thread::spawn(move || {
            // Returns when the device is disconnected.
            let _ = set(&worker, NBD_DO_IT, 0);
            drop(socket);
        });
        let swap = Self { device };
        let deadline = Instant::now() + Duration::from_secs(10);
        while read_to_string("/sys/block/nbd0/pid").is_err() {
            if Instant::now() > deadline {
                bail!("the network block device does not connect");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        tool("mkswap")?;
        tool("swapon")?;
        Ok(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = tool("swapoff");
        let _ = set(&self.device, NBD_DISCONNECT, 0);
    }
}

fn tool(name: &str) -> Result<()> {
    let output = Command::new(name).arg(DEVICE).output().with_context(|| format!("{name} is missing"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn set(device: &File, what: libc::c_ulong, value: u64) -> std::io::Result<()> {
    // SAFETY: the ioctls of NBD take numbers by value.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), what, value) };
    if result >= 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Limits the memory of this process, for good, to `bytes`.
///
/// # Errors
/// The kernel has no cgroup v2 with the memory controller, or this process may not use it.
pub fn limit(bytes: u64) -> Result<()> {
    let group = Path::new(GROUP);
    let root = group.parent().context("it has a parent")?;
    write(root.join("cgroup.subtree_control"), "+memory").context("no cgroup v2 with memory limits")?;
    std::fs::create_dir_all(group)?;
    write(group.join("memory.max"), bytes.to_string())?;
    write(group.join("cgroup.procs"), std::process::id().to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_to_the_block_device_is_read() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("an address");
        std::thread::spawn(move || serve(&listener, 1 << 20));
        let mut socket = TcpStream::connect(address).expect("it listens");
        let mut ask = |kind: u16, offset: u64, len: u32, data: &[u8], answer: &mut [u8]| {
            let mut request = REQUEST.to_be_bytes().to_vec();
            request.extend_from_slice(&u32::from(kind).to_be_bytes());
            request.extend_from_slice(b"cookie42");
            request.extend_from_slice(&offset.to_be_bytes());
            request.extend_from_slice(&len.to_be_bytes());
            request.extend_from_slice(data);
            socket.write_all(&request).expect("it is taken");
            let mut reply = [0; 16];
            socket.read_exact(&mut reply).expect("an answer");
            assert_eq!(reply[..8], [REPLY.to_be_bytes(), [0; 4]].concat()[..]);
            assert_eq!(&reply[8..], b"cookie42");
            socket.read_exact(answer).expect("the rest");
        };
        ask(WRITE, 8192, 5, b"hello", &mut []);
        let mut answer = [0; 7];
        ask(READ, 8191, 7, &[], &mut answer);
        assert_eq!(&answer, b"\0hello\0");
    }
}
