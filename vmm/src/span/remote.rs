//! A vCPU that runs on another PC, as the console node's vCPU loop sees it.

use std::sync::Arc;

use super::share::Share;
use crate::cpu::{Processor, VmEntry, VmExit};

/// See the [module](self): [`cpu::run`](crate::cpu::run) drives it like every other one.
pub struct Remote {
    share: Arc<Share>,
    number: u8,
    stop: bool,
}

impl Remote {
    /// The vCPU `number` of `share`.
    #[must_use]
    pub fn new(share: Arc<Share>, number: u8) -> Self {
        Self { share, number, stop: false }
    }

    /// What it is a part of.
    #[must_use]
    pub fn share(&self) -> &Arc<Share> {
        &self.share
    }
}

impl Processor for Remote {
    fn enter(&mut self, entry: VmEntry) -> VmExit {
        self.share.enter(self.number, entry, std::mem::take(&mut self.stop))
    }

    fn interrupt(&mut self) {
        self.stop = true;
    }
}
