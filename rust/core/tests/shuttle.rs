//! Random programs of several threads under random schedules: registry, leases and phases together.
//!
//! `DISTGUARD_SCHEDULES` is the number of schedules over all tests. shuttle has no time: it reports
//! a lost wake-up as a deadlock, and threads that wake each other forever take too many steps.
//! A failure prints its schedule; `shuttle::replay` runs it again.

#![cfg(shuttle)]

mod common;
#[path = "shuttle/program.rs"]
mod program;
#[path = "shuttle/truth.rs"]
mod truth;

use std::sync::Arc;
use std::time::Instant;

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, MaxSteps, Runner};
use truth::Counts;

/// Takes about ten seconds.
const SCHEDULES: usize = 100_000;

fn check(percent: usize, threads: u64, scheduler: fn(usize) -> Box<dyn Scheduler + Send>) {
    let all = std::env::var("DISTGUARD_SCHEDULES").map_or(SCHEDULES, |it| {
        it.parse().expect("DISTGUARD_SCHEDULES is a number")
    });
    let mut config = Config::new();
    // Every program ends long before; a livelock should be found soon.
    config.max_steps = MaxSteps::FailAfter(20_000);
    let (begun, counts) = (Instant::now(), Arc::new(Counts::default()));
    let counted = counts.clone();
    let runner = Runner::new(scheduler(all * percent / 100), config);
    let ran = runner.run(move || program::run(threads, &counted));
    println!(
        "\ncounted: {}: {ran} schedules, {counts}, {:.1} s",
        std::thread::current().name().unwrap_or("?"),
        begun.elapsed().as_secs_f64()
    );
}

#[test]
fn programs_of_three_threads_keep_every_promise() {
    check(50, 3, |it| Box::new(RandomScheduler::new(it)));
}

#[test]
fn programs_of_four_threads_keep_every_promise() {
    check(30, 4, |it| Box::new(RandomScheduler::new(it)));
}

#[test]
fn programs_that_are_seldom_interrupted_keep_every_promise() {
    check(20, 3, |it| Box::new(PctScheduler::new(4, it)));
}
