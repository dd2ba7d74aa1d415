//! What any ranks make of any log: each has read a part of it, and none contradicts another.

use std::collections::BTreeSet;

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

/// Who has the turn, as far as this rank has read: asks that passed and whose turn has not ended.
fn turns(rank: &Agreement) -> BTreeSet<(&'static str, u64)> {
    let rounds = NAMES
        .into_iter()
        .flat_map(|name| (0..ROUNDS).map(move |it| (name, it)));
    rounds
        .filter(|(name, round)| {
            rank.stands(name, *round, Stage::Ask) == Standing::Passed
                && rank.stands(name, *round, Stage::Turn) == Standing::Open
        })
        .collect()
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
    fn after_any_log_at_most_one_has_the_turn(log in entries()) {
        let rank = Agreement::new();
        for entry in &log {
            apply(&rank, entry);
            prop_assert!(turns(&rank).len() <= 1);
        }
    }

    #[test]
    fn whoever_has_the_turn_keeps_it_until_an_entry_about_it(log in entries()) {
        let rank = Agreement::new();
        for entry in &log {
            let before = turns(&rank);
            apply(&rank, entry);
            for (name, round) in before {
                let over = entry.name == name
                    && (entry.round > round || (entry.round, entry.stage) == (round, Stage::Turn));
                prop_assert!(over || turns(&rank).contains(&(name, round)));
            }
        }
    }

    #[test]
    fn when_every_turn_is_ended_nothing_that_was_agreed_is_left_waiting(log in entries()) {
        let rank = Agreement::new();
        for entry in &log {
            apply(&rank, entry);
        }
        let mut ended = 0;
        while let Some((name, round)) = turns(&rank).first().copied() {
            let (name, stage, failure) = (name.to_owned(), Stage::Turn, None);
            apply(&rank, &Entry { name, round, stage, failure });
            ended += 1;
            prop_assert!(ended <= NAMES.len() * 2, "turns go on without end");
        }
        // A new name has its turn at once: nobody holds it for ever.
        let (name, stage, failure) = ("z".to_owned(), Stage::Ask, None);
        apply(&rank, &Entry { name, round: 0, stage, failure });
        prop_assert_eq!(rank.stands("z", 0, Stage::Ask), Standing::Passed);
    }
}
