//! The wait-for graph: of threads that wait for each other, one is refused and all of them end.

use distguard_core::error::Error;
use distguard_core::guard::LeadGuard;
use distguard_core::key::Key;
use distguard_core::phases::Phase;
use distguard_core::registry::{Registry, Step};
use distguard_core::waitgraph::{Edge, Subject};

use crate::common::{enter, groups, inside, lead, request_for};
use crate::explore::{all, blocking, explore, shared, spawn, Bound};

type Named = Vec<(u64, Subject)>;

/// The cycle in an order that does not depend on which thread was refused.
fn named(cycle: &[Edge]) -> Named {
    let named = |it: &Edge| (it.thread.0, it.subject.clone());
    let mut named: Vec<_> = cycle.iter().map(named).collect();
    named.sort();
    named
}

/// Asks for `wanted`; releases `own` in any case. Returns the cycle if it was refused for one.
fn ask(registry: &Registry, own: LeadGuard<'_>, thread: u64, wanted: &Key) -> Option<Named> {
    let step = blocking(registry, request_for(thread, wanted));
    let cycle = match step {
        Ok(Step::Lead(ticket)) => {
            assert!(registry.fail(ticket, "done"));
            None
        }
        Err(Error::Deadlock { cycle }) => Some(named(&cycle)),
        other => panic!("{other:?}"),
    };
    drop(own);
    cycle
}

/// The only answer that names a cycle.
fn only(refused: impl IntoIterator<Item = Option<Named>>) -> Named {
    let refused: Vec<_> = refused.into_iter().flatten().collect();
    let [cycle] = refused.try_into().expect("exactly one is refused");
    cycle
}

#[test]
fn of_two_threads_that_want_each_others_keys_one_is_refused() {
    explore(Bound::None, || {
        let registry = shared();
        let (a, b) = (groups("a"), groups("b"));
        let of_a = lead(&registry, &request_for(0, &a));
        let of_b = lead(&registry, &request_for(1, &b));
        let other = spawn(&registry, {
            let a = a.clone();
            move |registry| ask(registry, LeadGuard::new(registry, of_b), 1, &a)
        });
        let own = ask(&registry, LeadGuard::new(&registry, of_a), 0, &b);
        let cycle = only([own, other.join().unwrap()]);
        assert_eq!(cycle, [(0, (&b).into()), (1, (&a).into())]);
    });
}

#[test]
fn of_two_threads_that_take_keys_in_another_order_no_two_are_refused() {
    explore(Bound::None, || {
        let registry = shared();
        let take = |thread, first: Key, second: Key| {
            move |registry: &Registry| match blocking(registry, request_for(thread, &first)) {
                Ok(Step::Lead(ticket)) => {
                    ask(registry, LeadGuard::new(registry, ticket), thread, &second)
                }
                other => panic!("{other:?}"),
            }
        };
        let other = spawn(&registry, take(1, groups("b"), groups("a")));
        let own = take(0, groups("a"), groups("b"))(&registry);
        let refused = [own, other.join().unwrap()].into_iter().flatten();
        assert!(refused.count() <= 1);
    });
}

#[test]
fn of_three_threads_in_a_ring_one_is_refused() {
    explore(Bound::Preemptions { full: 5, short: 3 }, || {
        let registry = shared();
        let keys = ["a", "b", "c"].map(groups);
        let [of_a, of_b, of_c] = [(0, &keys[0]), (1, &keys[1]), (2, &keys[2])]
            .map(|(it, key)| lead(&registry, &request_for(it, key)));
        let start = |ticket, thread, wanted: &Key| {
            let wanted = wanted.clone();
            spawn(&registry, move |registry| {
                ask(registry, LeadGuard::new(registry, ticket), thread, &wanted)
            })
        };
        let others = [start(of_b, 1, &keys[2]), start(of_c, 2, &keys[0])];
        let own = ask(&registry, LeadGuard::new(&registry, of_a), 0, &keys[1]);
        let [one, two] = all(others);
        let [a, b, c] = keys.each_ref().map(Subject::from);
        assert_eq!(only([own, one, two]), [(0, b), (1, c), (2, a)]);
    });
}

#[test]
fn of_a_cycle_over_a_key_and_a_phase_one_is_refused() {
    explore(Bound::None, || {
        let registry = shared();
        let key = groups("a");
        let ticket = lead(&registry, &request_for(0, &key));
        let forward = inside(&registry, Phase::Forward, 1);
        let other = spawn(&registry, {
            let key = key.clone();
            move |registry| {
                let step = blocking(registry, request_for(1, &key));
                assert!(registry.leave(forward));
                match step {
                    Ok(Step::Lead(ticket)) => {
                        assert!(registry.fail(ticket, "done"));
                        None
                    }
                    Err(Error::Deadlock { cycle }) => Some(named(&cycle)),
                    other => panic!("{other:?}"),
                }
            }
        });
        let captured = enter(&registry, Phase::Capture, 0);
        assert!(registry.fail(ticket, "done"));
        let own = match captured {
            Ok(visit) => {
                assert!(registry.leave(visit));
                None
            }
            Err(Error::Deadlock { cycle }) => Some(named(&cycle)),
            other => panic!("{other:?}"),
        };
        let cycle = only([own, other.join().unwrap()]);
        assert_eq!(cycle, [(0, (&Phase::Capture).into()), (1, (&key).into())]);
        assert!(registry.snapshot().visits.is_empty());
    });
}

#[test]
fn a_waiter_that_is_about_to_look_again_is_no_part_of_a_cycle() {
    explore(Bound::None, || {
        let registry = shared();
        let (a, b) = (groups("a"), groups("b"));
        let mut other_values = request_for(2, &a);
        other_values.spec = crate::common::spec(2);
        let of_a = lead(&registry, &request_for(0, &a));
        let of_b = lead(&registry, &request_for(1, &b));
        // Leads b and waits for a; is refused if a is being made with other values.
        let other = spawn(&registry, {
            let a = a.clone();
            move |registry| {
                let step = blocking(registry, request_for(1, &a));
                let refused = match step {
                    Ok(Step::Lead(ticket)) => {
                        assert!(registry.fail(ticket, "done"));
                        false
                    }
                    Err(Error::SpecMismatch { .. }) => true,
                    other => panic!("{other:?}"),
                };
                assert!(registry.fail(of_b, "done"));
                refused
            }
        });
        assert!(registry.fail(of_a, "done"));
        // Leads a for other values, if it comes first, and asks for b.
        if let Ok(Step::Lead(ticket)) = registry.try_acquire(&other_values) {
            let mut wanted = request_for(2, &b);
            wanted.spec = crate::common::spec(1);
            let step = blocking(&registry, wanted);
            let Ok(Step::Lead(of_b)) = step else {
                panic!("no thread waits for this thread: {step:?}");
            };
            assert!(registry.fail(of_b, "done"));
            assert!(registry.fail(ticket, "done"));
        }
        other.join().unwrap();
    });
}
