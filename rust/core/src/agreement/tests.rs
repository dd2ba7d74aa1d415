//! Unit tests of `agreement`.

use super::*;

fn entry(name: &str, round: u64, stage: Stage, failure: Option<&str>) -> Entry {
    Entry {
        name: name.into(),
        round,
        stage,
        failure: failure.map(Into::into),
    }
}

fn read(agreement: &Agreement, entries: &[Entry]) {
    for entry in entries {
        assert!(agreement.apply(agreement.next(), entry.clone()));
    }
}

fn actor(thread: u64) -> Actor {
    Actor {
        thread: ThreadId(thread),
        thread_name: format!("t{thread}").into(),
        runner: None,
    }
}

fn begin(agreement: &Agreement, thread: u64, alive: &[ThreadId]) -> Result<u64, Actor> {
    let begun: Result<_, ()> =
        agreement.begin("a", &actor(thread), |other| Ok(alive.contains(&other)));
    begun.expect("this check for living threads never fails")
}

#[test]
fn the_first_that_is_ready_has_the_turn_and_after_it_the_first_by_name() {
    let ranks = Agreement::new();
    read(
        &ranks,
        &["m", "z", "a"].map(|name| entry(name, 0, Stage::Ask, None)),
    );
    assert_eq!(ranks.stands("m", 0, Stage::Begin), Standing::Passed);
    assert_eq!(ranks.stands("a", 0, Stage::Ask), Standing::Passed);
    assert_eq!(ranks.stands("a", 0, Stage::Begin), Standing::Open);
    read(&ranks, &[entry("m", 0, Stage::Turn, None)]);
    assert_eq!(ranks.stands("a", 0, Stage::Begin), Standing::Passed);
    assert_eq!(ranks.stands("z", 0, Stage::Begin), Standing::Open);
    assert_eq!(ranks.stands("m", 0, Stage::Turn), Standing::Passed);
}

#[test]
fn a_rank_enters_its_turn_when_it_has_left_the_one_before() {
    let ranks = Agreement::new();
    read(
        &ranks,
        &["a", "b"].map(|name| entry(name, 0, Stage::Ask, None)),
    );
    assert_eq!(ranks.enter("b", 0), Standing::Open);
    assert_eq!(ranks.enter("a", 0), Standing::Passed);
    read(&ranks, &[entry("a", 0, Stage::Turn, Some("aborted"))]);
    assert_eq!(ranks.turn(), Some(("b".into(), 0)));
    assert_eq!(ranks.enter("b", 0), Standing::Open);
    ranks.leave("b", 0);
    assert_eq!(ranks.enter("b", 0), Standing::Open);
    ranks.leave("a", 0);
    assert_eq!(ranks.enter("b", 0), Standing::Passed);
}

#[test]
fn whether_a_round_began_is_known_as_soon_as_the_log_tells() {
    let ranks = Agreement::new();
    assert_eq!(ranks.began("a", 0), None);
    read(
        &ranks,
        &["a", "b"].map(|name| entry(name, 0, Stage::Ask, None)),
    );
    assert_eq!(ranks.began("a", 0), Some(true));
    assert_eq!(ranks.began("b", 0), None);
    read(&ranks, &[entry("b", 0, Stage::Turn, Some("queued"))]);
    assert_eq!(ranks.began("b", 0), Some(false));
    read(&ranks, &[entry("a", 0, Stage::Turn, None)]);
    assert_eq!(ranks.began("a", 0), Some(true));
    read(&ranks, &[entry("c", 0, Stage::Ask, Some("they disagree"))]);
    assert_eq!(ranks.began("c", 0), Some(false));
}

#[test]
fn the_end_of_a_round_is_still_known_when_the_next_one_has_begun() {
    let ranks = Agreement::new();
    read(
        &ranks,
        &[
            entry("a", 0, Stage::Ask, None),
            entry("a", 0, Stage::Turn, None),
            entry("a", 1, Stage::Ask, Some("aborted")),
        ],
    );
    assert_eq!(ranks.stands("a", 0, Stage::Turn), Standing::Passed);
    assert_eq!(ranks.began("a", 0), Some(true));
    let overtaken = Standing::Failed("overtaken by a later round".into());
    assert_eq!(ranks.stands("a", 0, Stage::Build), overtaken);
    read(&ranks, &[entry("a", 2, Stage::Ask, None)]);
    assert_eq!(ranks.stands("a", 0, Stage::Turn), overtaken);
}

#[test]
fn of_two_entries_about_the_same_stage_the_first_counts() {
    let ranks = Agreement::new();
    let stopped = entry("a", 0, Stage::Ask, Some("rank 1 stopped waiting"));
    read(&ranks, &[stopped, entry("a", 0, Stage::Ask, None)]);
    let failed = Standing::Failed("rank 1 stopped waiting".into());
    assert_eq!(ranks.stands("a", 0, Stage::Ask), failed);
    read(&ranks, &[entry("b", 0, Stage::Ask, None)]);
    assert_eq!(ranks.stands("b", 0, Stage::Begin), Standing::Passed);
}

#[test]
fn a_failed_turn_passes_on_and_its_name_may_be_asked_for_again() {
    let ranks = Agreement::new();
    assert_eq!(begin(&ranks, 1, &[]), Ok(0));
    read(
        &ranks,
        &[
            entry("a", 0, Stage::Ask, None),
            entry("b", 0, Stage::Ask, None),
            entry("a", 0, Stage::Turn, Some("rank 0 failed")),
        ],
    );
    assert_eq!(ranks.stands("b", 0, Stage::Begin), Standing::Passed);
    assert_eq!(begin(&ranks, 1, &[]), Ok(1));
    assert_eq!(ranks.stands("a", 1, Stage::Ask), Standing::Open);
    read(&ranks, &[entry("b", 0, Stage::Turn, None)]);
    read(&ranks, &[entry("a", 1, Stage::Ask, None)]);
    assert_eq!(ranks.stands("a", 1, Stage::Begin), Standing::Passed);
}

#[test]
fn a_ready_round_that_is_aborted_before_its_turn_never_has_it() {
    let ranks = Agreement::new();
    read(
        &ranks,
        &[
            entry("a", 0, Stage::Ask, None),
            entry("b", 0, Stage::Ask, None),
            entry("b", 0, Stage::Turn, Some("rank 1 was interrupted")),
            entry("a", 0, Stage::Turn, None),
            entry("c", 0, Stage::Ask, None),
        ],
    );
    assert_eq!(ranks.stands("c", 0, Stage::Begin), Standing::Passed);
    for stage in [Stage::Begin, Stage::Turn] {
        let stands = ranks.stands("b", 0, stage);
        assert_eq!(stands, Standing::Failed("rank 1 was interrupted".into()));
    }
}

#[test]
fn two_living_threads_do_not_work_under_one_name() {
    let ranks = Agreement::new();
    let alive = [ThreadId(1), ThreadId(2)];
    assert_eq!(begin(&ranks, 1, &alive), Ok(0));
    assert_eq!(begin(&ranks, 2, &alive), Err(actor(1)));
    assert_eq!(begin(&ranks, 1, &alive), Ok(0));
    assert_eq!(begin(&ranks, 2, &alive[1..]), Ok(0));
    ranks.end("a");
    assert_eq!(begin(&ranks, 1, &alive), Ok(0));
}

#[test]
fn a_thread_that_begins_while_its_predecessor_is_found_dead_keeps_the_name() {
    let ranks = Agreement::new();
    assert_eq!(begin(&ranks, 1, &[]), Ok(0));
    let third = ThreadId(3);
    let begun: Result<_, ()> = ranks.begin("a", &actor(2), |other| {
        if other != third {
            assert_eq!(begin(&ranks, 3, &[]), Ok(0));
        }
        Ok(other == third)
    });
    assert_eq!(begun, Ok(Err(actor(3))));
}

#[test]
fn a_rank_tells_the_others_once_how_a_stage_went() {
    let ranks = Agreement::new();
    assert_eq!(begin(&ranks, 1, &[]), Ok(0));
    assert!(ranks.arrive("a", 0, Stage::Build));
    assert!(!ranks.arrive("a", 0, Stage::Build));
    assert!(ranks.arrive("a", 0, Stage::Turn));
    read(&ranks, &[entry("a", 0, Stage::Ask, Some("failed"))]);
    assert_eq!(begin(&ranks, 1, &[]), Ok(1));
    assert!(!ranks.arrive("a", 0, Stage::Build));
    assert!(ranks.arrive("a", 1, Stage::Build));
}

#[test]
fn a_round_that_this_rank_reported_is_over_for_it_even_if_it_did_not_read_how_it_ended() {
    let ranks = Agreement::new();
    assert_eq!(begin(&ranks, 1, &[]), Ok(0));
    assert!(ranks.arrive("a", 0, Stage::Ask));
    ranks.end("a");
    assert_eq!(begin(&ranks, 1, &[]), Ok(1));
    // This round was not reported: the other ranks may be in it.
    assert_eq!(begin(&ranks, 1, &[]), Ok(1));
}

#[test]
fn entries_are_taken_in_order_and_once() {
    let ranks = Agreement::new();
    let ready = entry("a", 0, Stage::Ask, None);
    let taken = [1, 0, 0].map(|index| ranks.apply(index, ready.clone()));
    assert_eq!((taken, ranks.next()), ([false, true, false], 1));
}

#[test]
fn one_thread_reads_until_no_thread_waits_for_an_open_stage() {
    let ranks = Agreement::new();
    assert!(ranks.begin_wait("a", 0, Stage::Ask));
    assert!(!ranks.begin_wait("b", 0, Stage::Ask));
    assert_eq!(ranks.next_to_read(), Some(0));
    read(&ranks, &[entry("a", 0, Stage::Ask, None)]);
    assert_eq!(ranks.next_to_read(), Some(1));
    ranks.end_wait("b", 0, Stage::Ask);
    assert!(ranks.is_reading());
    // The waiter for "a" has not noticed yet that its entry came.
    assert_eq!(ranks.next_to_read(), None);
    assert!(!ranks.is_reading());
    assert!(!ranks.begin_wait("a", 0, Stage::Ask));
    assert!(ranks.begin_wait("a", 0, Stage::Turn));
}

#[test]
fn a_lost_log_fails_what_is_open_and_nothing_else() {
    let ranks = Agreement::new();
    read(&ranks, &[entry("a", 0, Stage::Ask, None)]);
    ranks.lose("connection refused");
    assert_eq!(ranks.stands("a", 0, Stage::Ask), Standing::Passed);
    let lost = Standing::Failed("connection refused".into());
    assert_eq!(ranks.stands("a", 0, Stage::Turn), lost);
    assert_eq!(ranks.stands("b", 0, Stage::Ask), lost);
    assert!(!ranks.begin_wait("a", 0, Stage::Turn));
    assert_eq!(ranks.next_to_read(), None);
}

#[test]
fn a_round_that_a_rank_has_left_keeps_the_turn_until_the_others_are_out_of_it() {
    let ranks = Agreement::new();
    read(
        &ranks,
        &[
            entry("a", 0, Stage::Ask, None),
            entry("b", 0, Stage::Ask, None),
            entry("a", 1, Stage::Ask, Some("rank 0 did not ask")),
        ],
    );
    assert_eq!(ranks.turn(), Some(("a".into(), 0)));
    assert_eq!(ranks.stands("b", 0, Stage::Begin), Standing::Open);
    read(&ranks, &[entry("a", 0, Stage::Turn, Some("rank 1 failed"))]);
    assert_eq!(ranks.stands("b", 0, Stage::Begin), Standing::Passed);
}

#[test]
fn a_round_in_line_that_a_rank_has_left_never_has_the_turn() {
    let ranks = Agreement::new();
    read(
        &ranks,
        &[
            entry("a", 0, Stage::Ask, None),
            entry("b", 0, Stage::Ask, None),
            entry("b", 1, Stage::Ask, Some("rank 0 did not ask")),
            entry("a", 0, Stage::Turn, None),
        ],
    );
    assert_eq!(ranks.turn(), None);
    assert!(matches!(
        ranks.stands("b", 0, Stage::Begin),
        Standing::Failed(_)
    ));
}

#[test]
fn entries_are_outlived_once_all_ranks_have_gone_past_them() {
    let ranks = Agreement::new();
    let ask = entry("a", 0, Stage::Ask, None);
    ranks.read_own(0);
    ranks.read_own(1);
    read(&ranks, &[entry("b", 0, Stage::Ask, Some("x")), ask]);
    for index in [0, 1, 2] {
        assert!(ranks.wrote(index));
    }
    assert!(ranks.outlived("a", 0, Stage::Ask).is_empty());
    assert!(ranks.outlived("a", 1, Stage::Turn).is_empty());
    assert_eq!(ranks.outlived("a", 0, Stage::Turn), [0, 1]);
    assert!(ranks.outlived("a", 0, Stage::Turn).is_empty());
    read(&ranks, &[entry("a", 0, Stage::Turn, None)]);
    assert_eq!(ranks.outlived("a", 0, Stage::Build), [2]);
}

#[test]
fn an_entry_that_was_written_where_another_had_been_read_is_read_by_no_rank() {
    let ranks = Agreement::new();
    read(&ranks, &[entry("a", 0, Stage::Ask, None)]);
    assert!(!ranks.wrote(0));
    assert!(ranks.wrote(1));
    assert_eq!(ranks.outlived("a", 0, Stage::Turn), []);
    read(&ranks, &[entry("a", 0, Stage::Turn, None)]);
    assert_eq!(ranks.outlived("a", 0, Stage::Build), [1]);
}

#[test]
fn an_entry_about_the_begin_stage_is_ignored() {
    let ranks = Agreement::new();
    read(&ranks, &[entry("a", 0, Stage::Begin, None)]);
    assert_eq!(ranks.stands("a", 0, Stage::Begin), Standing::Open);
}

#[test]
fn another_thread_may_read_when_the_first_could_not_be_started() {
    let ranks = Agreement::new();
    assert!(ranks.begin_wait("a", 0, Stage::Ask));
    assert!(!ranks.begin_wait("a", 0, Stage::Ask));
    ranks.end_reading();
    assert!(ranks.begin_wait("a", 0, Stage::Ask));
}
