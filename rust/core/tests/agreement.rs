//! Ranks that read any shared log, each a part of it: none contradicts another.

use distguard_core::agreement::{Agreement, Entry, Stage, Standing};
use proptest::prelude::*;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const ROUNDS: u64 = 3;

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let entry = (
        prop::sample::select(NAMES.to_vec()),
        0..ROUNDS,
        prop::sample::select(Stage::ALL.to_vec()),
        prop::option::weighted(0.3, Just("failed".to_owned())),
    );
    let entry = entry.prop_map(|(name, round, stage, failure)| Entry {
        name: name.into(),
        round,
        stage,
        failure,
    });
    prop::collection::vec(entry, 0..40)
}

fn apply(rank: &Agreement, entry: &Entry) {
    assert!(rank.apply(rank.next(), entry.clone()));
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_round_that_may_begin_has_the_turn(log in entries()) {
        let rank = Agreement::new();
        for entry in &log {
            apply(&rank, entry);
            for name in NAMES {
                for round in 0..ROUNDS {
                    let may_begin = rank.stands(name, round, Stage::Begin) == Standing::Passed;
                    prop_assert!(!may_begin || rank.turn() == Some((name.to_owned(), round)));
                }
            }
        }
    }

    #[test]
    fn a_round_that_has_the_turn_keeps_it_until_an_entry_about_it(log in entries()) {
        let rank = Agreement::new();
        for entry in &log {
            let before = rank.turn();
            apply(&rank, entry);
            let over = before == Some((entry.name.clone(), entry.round))
                && entry.stage == Stage::Turn;
            prop_assert!(before.is_none() || over || rank.turn() == before);
        }
    }

    #[test]
    fn a_rank_is_in_one_turn_at_a_time(
        log in entries(),
        stays in prop::collection::vec(prop::bool::ANY, 40),
    ) {
        let rank = Agreement::new();
        let mut inside: Option<(&str, u64)> = None;
        for (entry, stay) in log.iter().zip(stays) {
            apply(&rank, entry);
            if let Some((name, round)) = inside.take_if(|_| !stay) {
                rank.leave(name, round);
            }
            for name in NAMES {
                for round in 0..ROUNDS {
                    if rank.enter(name, round) == Standing::Passed {
                        prop_assert!(inside.is_none_or(|it| it == (name, round)));
                        inside = Some((name, round));
                    }
                }
            }
        }
    }

    #[test]
    fn when_every_turn_has_ended_no_agreed_round_is_left_waiting(log in entries()) {
        let rank = Agreement::new();
        for entry in &log {
            apply(&rank, entry);
        }
        let mut ended = 0;
        while let Some((name, round)) = rank.turn() {
            let (stage, failure) = (Stage::Turn, None);
            apply(&rank, &Entry { name, round, stage, failure });
            ended += 1;
            prop_assert!(ended <= NAMES.len() * 2, "turns go on without end");
        }
        // A new name has its turn at once: no round keeps the turn forever.
        let (name, stage, failure) = ("z".to_owned(), Stage::Ask, None);
        apply(&rank, &Entry { name, round: 0, stage, failure });
        prop_assert_eq!(rank.stands("z", 0, Stage::Begin), Standing::Passed);
    }
}
