//! Two partitions whose RAM is one, kept coherent between two members.

use super::*;
use crate::memory::coherence::testing::{Order, Scene};

/// So often each guest goes round.
const ROUNDS: u32 = 100_000;

/// Two guests of one vCPU each, at two members, with `code` in the RAM that they share. The second one's `bx` is 1.
/// `None` where there is no KVM or no userfaultfd.
fn pair(code: &[u8], order: Order) -> Option<(Scene, [Guest; 2])> {
    if !runs() {
        return None;
    }
    let mut scene = Scene::new(2, 16 << 20, 1, order)?;
    let mut rams = std::mem::take(&mut scene.rams).into_iter();
    let guests = [0, 1].map(|_| Guest::on(rams.next().expect("of each member"), 1, code));
    let second = guests[1].vcpus[0].lock().expect("no panic");
    let regs = second.fd().get_regs().expect("registers");
    second.fd().set_regs(&kvm_bindings::kvm_regs { rbx: 1, ..regs }).expect("registers");
    drop(second);
    Some((scene, guests))
}

/// Runs both to their ends.
fn run(scene: &Scene, guests: &[Guest; 2]) {
    guests.iter().for_each(|guest| guest.gang.resume());
    for guest in guests {
        assert_eq!(guest.event(), Event::Action(Action::PowerOff));
    }
    scene.nobody_stopped();
}

#[test]
fn no_locked_increment_of_guests_at_two_members_is_lost() {
    let mut code = vec![0x66, 0xb9]; // mov ecx, ROUNDS
    code.extend(ROUNDS.to_le_bytes());
    code.extend([
        0xf0, 0x66, 0xff, 0x06, 0x00, 0x50, // again: lock inc dword [0x5000]
        0x66, 0x49, 0x75, 0xf6, // dec ecx; jnz again
        0xe6, 0x17, 0xf4, // out 0x17, al; hlt
    ]);
    for order in [Order::Sent, Order::Any(5)] {
        let Some((scene, guests)) = pair(&code, order) else { return };
        run(&scene, &guests);
        for guest in &guests {
            assert_eq!(guest.word(0x5000), 2 * ROUNDS);
        }
        let counters = scene.counters(0);
        assert!(counters.fetched > 1 && counters.sent > 1, "the page went to and fro: {counters:?}");
    }
}

/// The first guest writes the numbers from 1 to [`ROUNDS`] to `data`, each then to 0x7000. The second one reads 0x7000
/// and then does `read`, which gets ecx from `data`, and counts at 0x8000 how often that was less. Both end with the
/// last number.
fn messages(data: u16, read: &[u8]) -> Vec<u8> {
    let [low, high] = data.to_le_bytes();
    let writer = [0x66, 0x31, 0xc0, 0x66, 0x40, 0x66, 0xa3, low, high, 0x66, 0xa3, 0x00, 0x70, 0x66, 0x3d];
    let mut code = vec![0x85, 0xdb, 0x75, writer.len() as u8 + 9]; // test bx, bx; jnz to the reader
    code.extend(writer); // xor eax, eax; again: inc eax; mov [data], eax; mov [0x7000], eax; cmp eax, ROUNDS
    code.extend(ROUNDS.to_le_bytes());
    code.extend([0x75, 0xee, 0xe6, 0x17, 0xf4]); // jne again; out 0x17, al; hlt
    let reader = code.len();
    code.extend([0x66, 0xa1, 0x00, 0x70]); // mov eax, [0x7000]
    code.extend(read);
    code.extend([0x66, 0x39, 0xc1, 0x73, 0x05, 0x66, 0xff, 0x06, 0x00, 0x80]); // cmp ecx, eax; jae; inc [0x8000]
    code.extend([0x66, 0x3d]); // cmp eax, ROUNDS
    code.extend(ROUNDS.to_le_bytes());
    let back = reader as i32 - code.len() as i32 - 2;
    code.extend([0x75, back as u8, 0xe6, 0x17, 0xf4]); // jne reader; out 0x17, al; hlt
    code
}

#[test]
fn a_guest_at_one_member_never_sees_a_message_of_the_other_before_what_it_is_about() {
    let code = messages(0x6000, &[0x66, 0x8b, 0x0e, 0x00, 0x60]); // mov ecx, [0x6000]
    for order in [Order::Sent, Order::Any(6)] {
        let Some((scene, guests)) = pair(&code, order) else { return };
        run(&scene, &guests);
        for guest in &guests {
            assert_eq!((guest.word(0x6000), guest.word(0x7000)), (ROUNDS, ROUNDS));
            assert_eq!(guest.word(0x8000), 0, "old data was read");
        }
    }
}

#[test]
fn a_guest_runs_the_code_that_the_other_member_wrote_last() {
    // mov ecx, cr0; mov cr0, ecx (which forgets what was fetched before); jmp 0x9002
    let code_at = CODE as i32 + 32; // where `read` is
    let jump = 0x9002 - (code_at + 9);
    let mut read = vec![0x0f, 0x20, 0xc1, 0x0f, 0x22, 0xc1, 0xe9];
    read.extend((jump as i16).to_le_bytes());
    let code = messages(0x9004, &read);
    let Some((scene, guests)) = pair(&code, Order::Sent) else { return };
    // 0x9002: mov ecx, what is written; jmp back to behind the jump here
    let mut patched = vec![0x66, 0xb9, 0, 0, 0, 0, 0xe9];
    patched.extend(((code_at + 9 - (0x9002 + 9)) as i16).to_le_bytes());
    guests[0].ram.memory().write_slice(&patched, GuestAddress(0x9002)).expect("RAM");
    run(&scene, &guests);
    assert_eq!(guests[1].word(0x8000), 0, "old code was run");
    assert_eq!(guests[1].word(0x9004), ROUNDS);
}
