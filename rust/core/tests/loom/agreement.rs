//! The shared log of the ranks: an entry wakes its waiters, and a thread reads until then.

use std::sync::Arc;
use std::time::Duration;

use distguard_core::agreement::{Agreement, Entry, Stage, Standing};
use loom::thread::{self, JoinHandle};

use crate::explore::{explore, Bound};

fn built(name: &str) -> Entry {
    Entry {
        name: name.into(),
        round: 0,
        stage: Stage::Build,
        failure: None,
    }
}

/// Reads a log of two entries as long as a thread waits for one that is not read yet.
fn read(agreement: &Arc<Agreement>) -> JoinHandle<()> {
    let agreement = agreement.clone();
    thread::spawn(move || {
        while let Some(index) = agreement.next_to_read() {
            let entry = ["a", "b"].map(built)[usize::try_from(index).unwrap()].clone();
            assert!(agreement.apply(index, entry), "two threads read the log");
        }
    })
}

/// Waits for the end of `name`'s build; returns the reader that it had to start.
fn wait(agreement: &Arc<Agreement>, name: &str) -> Option<JoinHandle<()>> {
    let reader = agreement
        .begin_wait(name, 0, Stage::Build)
        .then(|| read(agreement));
    while agreement.stands(name, 0, Stage::Build) == Standing::Open {
        agreement.wait(name, 0, Stage::Build, Duration::from_secs(1));
    }
    agreement.end_wait(name, 0, Stage::Build);
    reader
}

#[test]
fn two_threads_that_wait_for_different_entries_are_both_woken_by_theirs() {
    explore(Bound::Preemptions { full: 4, short: 3 }, || {
        let agreement = Arc::new(Agreement::new());
        let other = {
            let agreement = agreement.clone();
            thread::spawn(move || wait(&agreement, "b"))
        };
        let readers = [wait(&agreement, "a"), other.join().unwrap()];
        for reader in readers.into_iter().flatten() {
            reader.join().unwrap();
        }
        assert!(!agreement.is_reading());
    });
}

#[test]
fn a_log_that_is_lost_wakes_its_waiters() {
    explore(Bound::None, || {
        let agreement = Arc::new(Agreement::new());
        let other = {
            let agreement = agreement.clone();
            thread::spawn(move || agreement.lose("gone"))
        };
        while agreement.stands("a", 0, Stage::Ask) == Standing::Open {
            agreement.wait("a", 0, Stage::Ask, Duration::from_secs(1));
        }
        other.join().unwrap();
    });
}
