//! Keeping a vCPU's time stamp counter at what the console node says, without the guest seeing it run backwards.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::kvm::tsc::{Rate, now};
use crate::kvm::{Error, Vcpu};

/// The longest wait for the counter to be moved back, in ticks. What is left is for the next time.
const LONGEST: i64 = 400_000;

/// What a vCPU's counter is to be.
pub(super) struct Steering {
    rate: Rate,
    /// What is to be added to this PC's counter, wrapping.
    offset: AtomicU64,
    /// It was said.
    known: AtomicBool,
    /// It was set.
    set: AtomicBool,
    /// What this PC's counter was when guest code was left last.
    left: AtomicU64,
}

impl Steering {
    pub(super) fn new(rate: Rate) -> Self {
        let [offset, left] = [0, now().0].map(AtomicU64::new);
        let [known, set] = [false, false].map(AtomicBool::new);
        Self { rate, offset, known, set, left }
    }

    /// Takes note of what is to be added. Whether that differs from before, so that the vCPU should look.
    pub(super) fn aim(&self, offset: u64) -> bool {
        let before = self.offset.swap(offset, Ordering::SeqCst);
        let first = !self.known.swap(true, Ordering::SeqCst);
        !first && offset != before
    }

    /// The vCPU's state came from elsewhere: the next time the counter is set whatever it says.
    pub(super) fn forget(&self) {
        self.set.store(false, Ordering::SeqCst);
    }

    /// Guest code was left just now.
    pub(super) fn left(&self) {
        self.left.store(now().0, Ordering::Relaxed);
    }

    /// Moves the counter of a vCPU that is about to be entered to where it has to be: forwards at once, and backwards
    /// after a wait that is as long, so that the guest never reads less than before.
    pub(super) fn set(&self, vcpu: &mut Vcpu) -> Result<(), Error> {
        if !self.known.load(Ordering::SeqCst) {
            return Ok(());
        }
        let wanted = self.offset.load(Ordering::SeqCst);
        if !self.set.swap(true, Ordering::SeqCst) {
            return vcpu.set_tsc_offset(wanted);
        }
        let is = vcpu.tsc_offset()?;
        let by = wanted.wrapping_sub(is) as i64;
        if by == 0 {
            return Ok(());
        }
        if by > 0 {
            return vcpu.set_tsc_offset(wanted);
        }
        let back = by.max(-LONGEST);
        let left = self.rate.to_guest(devices::interrupt::Tsc(self.left.load(Ordering::Relaxed))).0;
        while (self.rate.to_guest(now()).0.wrapping_sub(left) as i64) < -back {
            std::hint::spin_loop();
        }
        vcpu.set_tsc_offset(is.wrapping_add(back as u64))
    }
}
