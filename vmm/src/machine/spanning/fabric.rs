//! What the local APICs of the console node reach others by.

use std::sync::Arc;

use devices::interrupt::{Message, View};

use super::Spanning;
use crate::cpu::Fabric;
use crate::interrupt::Board;
use crate::memory::coherence::Ear;
use crate::span::share::Share;

/// See the [module](self): all helpers hear of their views.
struct Border {
    board: Arc<Board>,
    shares: Vec<Arc<Share>>,
    ear: Ear,
}

impl Spanning {
    /// See the [module](self).
    pub(in crate::machine) fn fabric(&self, board: &Arc<Board>) -> Arc<dyn Fabric> {
        let shares = self.helpers.iter().map(|helper| Arc::clone(&helper.share)).collect();
        Arc::new(Border { board: Arc::clone(board), shares, ear: self.engine.ear() })
    }
}

impl Fabric for Border {
    fn send(&self, message: Message) {
        Fabric::send(&*self.board, message);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.board.end_of_interrupt(vector);
    }

    fn view(&self, view: View) {
        self.shares.iter().for_each(|share| share.view(view));
        Fabric::view(&*self.board, view);
    }

    fn refused(&self, vector: u8) {
        self.board.refused(vector);
    }

    fn acknowledge(&self) -> Option<u8> {
        self.board.acknowledge()
    }

    fn halted(&self) {
        self.ear.rests();
    }
}
