use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

const LONG: Duration = Duration::from_secs(30);

/// vCPUs that count while they may run.
fn counting(count: usize) -> (Arc<Gang>, Arc<AtomicUsize>, Vec<thread::JoinHandle<()>>) {
    let gang = Arc::new(Gang::new(count));
    let counter = Arc::new(AtomicUsize::new(0));
    let threads = (0..count)
        .map(|_| {
            let (gang, counter) = (Arc::clone(&gang), Arc::clone(&counter));
            thread::spawn(move || {
                while gang.park() {
                    while gang.may_run() {
                        counter.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    (gang, counter, threads)
}

#[test]
fn nobody_runs_while_the_gang_is_paused() {
    let (gang, counter, threads) = counting(4);
    for _ in 0..50 {
        gang.pause(LONG).expect("they pause");
        let before = counter.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(1));
        assert_eq!(counter.load(Ordering::SeqCst), before, "somebody ran");
        gang.resume();
        while counter.load(Ordering::SeqCst) == before {
            thread::yield_now();
        }
    }
    gang.end();
    for thread in threads {
        thread.join().expect("it ends");
    }
}

#[test]
fn a_pause_does_not_wait_for_a_deferred_access_but_settling_does() {
    let gang = Arc::new(Gang::new(1));
    let token = Deferred::default();
    let (theirs, waited) = (Arc::clone(&gang), token.clone());
    let (begun, begins) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        assert!(theirs.park());
        begun.send(()).expect("the test waits");
        let answer = theirs.hold(&waited);
        assert!(!theirs.park(), "the gang ends");
        answer
    });
    gang.resume();
    begins.recv_timeout(LONG).expect("it runs");
    gang.pause(LONG).expect("holding counts as paused");
    assert!(gang.settle(Duration::from_millis(50)).is_err(), "the access is not finished");
    token.complete(&[5]);
    gang.settle(LONG).expect("the access is finished");
    gang.end();
    assert_eq!(thread.join().expect("it ends"), Some(vec![5]));
}

#[test]
fn a_vcpu_that_does_not_pause_is_reported() {
    let gang = Gang::new(2);
    let Stuck(count) = gang.pause(Duration::from_millis(10)).expect_err("nobody is there");
    assert_eq!(count, 2);
}

#[test]
fn a_pause_that_is_hopeless_is_given_up_and_its_order_stays() {
    let gang = Gang::new(1);
    gang.resume();
    assert!(gang.pause_unless(LONG, &|| true).is_err(), "nobody is there");
    assert!(!gang.may_run(), "whoever comes back from a page fault pauses");
}
