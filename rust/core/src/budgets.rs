//! What each device's memory was promised to, so that runners of one process do not size their pools
//! by what their neighbours happen to have loaded, and so that no more is promised than is there.
//!
//! ```text
//! state     what it means                              what it counts for
//! Opened    asks how much the device has for runners   what it takes
//! Promised  was promised bytes; loads                  the larger of promise and what it takes
//! Sized     has its pool; drafts pay for themselves    as Promised, or what it takes
//! ```
//!
//! The room of a device is what it had free when the first of its runners came. It is forgotten when
//! the last one goes, and measured again.
//!
//! Invariants:
//! - A runner is on one device at most.
//! - A draft that comes before its target has a pool is paid by the target's promise, as in SGLang.
//! - `promise` never lets the sum exceed the room, nor what `free` says.
//!
//! Lock order: a leaf. No foreign code runs under the lock.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::phases::RunnerId;
use crate::sync::{lock, Mutex};

/// One runner on a device.
#[derive(Debug, Clone)]
struct Account {
    runner: RunnerId,
    /// Whose promise pays for it: its own, or that of its target.
    payer: RunnerId,
    name: Arc<str>,
    promised: u64,
    /// The bytes of its tensors, when they were counted last.
    taken: u64,
    /// What the device seems to have for it, if that is not the device's room.
    room: Option<u64>,
    sized: bool,
    /// Whether another runner was on the device since it came.
    in_company: bool,
}

impl Account {
    fn cost(&self) -> u64 {
        self.promised.max(self.taken)
    }
}

#[derive(Debug, Default)]
struct Device {
    room: Option<u64>,
    accounts: Vec<Account>,
}

impl Device {
    fn account(&mut self, runner: RunnerId) -> Option<&mut Account> {
        self.accounts.iter_mut().find(|it| it.runner == runner)
    }

    /// What a payer and its drafts cost together.
    fn cost(&self, payer: RunnerId) -> u64 {
        let of_payer = || self.accounts.iter().filter(|it| it.payer == payer);
        let taken = of_payer().map(|it| it.taken).sum();
        of_payer().map(Account::cost).fold(taken, u64::max)
    }
}

/// Why a promise was refused; all numbers are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// What the device had for runners: its room, or less if others took some of it.
    pub room: u64,
    /// The other runners and what each was promised, or takes if that is more, oldest first.
    pub promised: Vec<(String, u64)>,
}

impl Shortage {
    /// What could be promised.
    pub fn left(&self) -> u64 {
        let sum = self.promised.iter().map(|(_, bytes)| bytes).sum();
        self.room.saturating_sub(sum)
    }
}

/// What a runner may count on; all numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// What the device has, or seems to have, for it.
    pub room: u64,
    /// What was promised to it.
    pub promised: u64,
    /// What the other runners take that the same promise pays for.
    pub taken_beside: u64,
    /// What was promised to runners for which the same promise does not pay, or what they take.
    pub others: u64,
    /// Whether what it takes is to be counted: it has a room of its own, or another runner, for which
    /// its promise does not pay, was on the device since it came.
    pub by_count: bool,
}

/// The promises of every device.
#[derive(Debug, Default)]
pub struct Budgets(Mutex<BTreeMap<String, Device>>);

impl Budgets {
    /// Notes that `runner` comes to `device`. Returns the room of the device; None if it is not
    /// known: then the caller measures it, and calls `measured`.
    pub fn open(
        &self,
        device: &str,
        runner: RunnerId,
        target: Option<RunnerId>,
        name: Arc<str>,
    ) -> Option<u64> {
        let mut devices = lock(&self.0);
        let device = devices.entry(device.to_owned()).or_default();
        let pays = |it: &&Account| Some(it.runner) == target && !it.sized;
        let payer = device
            .accounts
            .iter()
            .find(pays)
            .map_or(runner, |it| it.payer);
        let mut in_company = false;
        for other in &mut device.accounts {
            if other.payer != payer {
                other.in_company = true;
                in_company = true;
            }
        }
        device.accounts.retain(|it| it.runner != runner);
        device.accounts.push(Account {
            runner,
            payer,
            name,
            promised: 0,
            taken: 0,
            room: None,
            sized: false,
            in_company,
        });
        device.room
    }

    /// Notes what `device` has free, unless that is known. Returns its room.
    pub fn measured(&self, device: &str, free: u64) -> u64 {
        let mut devices = lock(&self.0);
        let device = devices.entry(device.to_owned()).or_default();
        *device.room.get_or_insert(free)
    }

    /// Promises `asked` bytes to `runner`. `free`: what the device would have free without the
    /// runners of this process, if that is known. `room`: what it shall seem to have for this runner.
    ///
    /// # Errors
    /// There is less than that. Nothing was changed.
    pub fn promise(
        &self,
        runner: RunnerId,
        asked: u64,
        free: Option<u64>,
        room: Option<u64>,
    ) -> Result<(), Shortage> {
        let mut devices = lock(&self.0);
        let Some(device) = of(&mut devices, runner) else {
            return Ok(());
        };
        let Some(payer) = device.account(runner).map(|it| it.payer) else {
            return Ok(());
        };
        if payer != runner {
            return Ok(());
        }
        let known = device.room.unwrap_or(u64::MAX);
        let others = device.accounts.iter();
        let others = others.filter(|it| it.payer != payer && it.payer == it.runner);
        let shortage = Shortage {
            room: free.map_or(known, |it| it.min(known)),
            promised: others
                .map(|it| (it.name.to_string(), device.cost(it.runner)))
                .filter(|(_, bytes)| *bytes > 0)
                .collect(),
        };
        if asked > shortage.left() {
            return Err(shortage);
        }
        if let Some(account) = device.account(runner) {
            account.promised = asked;
            account.room = room;
        }
        Ok(())
    }

    /// Notes that the tensors of `runner` take `bytes`.
    pub fn count(&self, runner: RunnerId, bytes: u64) {
        let mut devices = lock(&self.0);
        if let Some(account) = of(&mut devices, runner).and_then(|it| it.account(runner)) {
            account.taken = bytes;
        }
    }

    /// Notes that `runner` has its pool.
    pub fn sized(&self, runner: RunnerId) {
        let mut devices = lock(&self.0);
        if let Some(account) = of(&mut devices, runner).and_then(|it| it.account(runner)) {
            account.sized = true;
        }
    }

    /// What `runner` may count on; None if it is on no device.
    pub fn standing(&self, runner: RunnerId) -> Option<Standing> {
        let mut devices = lock(&self.0);
        let device = of(&mut devices, runner)?;
        let payer = device.account(runner)?.payer;
        let beside = device.accounts.iter();
        let beside = beside.filter(|it| it.payer == payer && it.runner != runner);
        let taken_beside = beside.map(|it| it.taken).sum();
        let others = device.accounts.iter();
        let others = others.filter(|it| it.payer != payer && it.payer == it.runner);
        let others = others.map(|it| device.cost(it.runner)).sum();
        let room = device.room;
        let of_payer = device.account(payer).map(|it| (it.room, it.in_company));
        let (own_room, in_company) = of_payer.unwrap_or((None, true));
        let account = device.account(runner)?;
        Some(Standing {
            room: own_room.or(room)?,
            promised: account.promised,
            taken_beside,
            others,
            by_count: own_room.is_some() || account.in_company || in_company,
        })
    }

    /// The runners on `device` that pay for themselves, and what each costs, oldest first.
    pub fn promised(&self, device: &str) -> Vec<(String, u64)> {
        let devices = lock(&self.0);
        let Some(device) = devices.get(device) else {
            return Vec::new();
        };
        let payers = device.accounts.iter().filter(|it| it.payer == it.runner);
        payers
            .map(|it| (it.name.to_string(), device.cost(it.runner)))
            .collect()
    }

    /// Takes back what was promised to `runner`. Drafts that it paid for pay for themselves.
    pub fn close(&self, runner: RunnerId) {
        let mut devices = lock(&self.0);
        for device in devices.values_mut() {
            device.accounts.retain(|it| it.runner != runner);
            for account in &mut device.accounts {
                if account.payer == runner {
                    account.payer = account.runner;
                }
            }
        }
        devices.retain(|_, it| !it.accounts.is_empty());
    }
}

fn of(devices: &mut BTreeMap<String, Device>, runner: RunnerId) -> Option<&mut Device> {
    devices
        .values_mut()
        .find(|it| it.accounts.iter().any(|it| it.runner == runner))
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const A: RunnerId = RunnerId(1);
    const B: RunnerId = RunnerId(2);
    const C: RunnerId = RunnerId(3);

    fn opened(budgets: &Budgets, runner: RunnerId, target: Option<RunnerId>) -> Option<u64> {
        budgets.open("cuda:0", runner, target, format!("r{}", runner.0).into())
    }

    #[test]
    fn the_room_is_what_the_first_runner_found_until_the_last_one_goes() {
        let budgets = Budgets::default();
        assert_eq!(opened(&budgets, A, None), None);
        assert_eq!(opened(&budgets, B, None), None); // both measure
        assert_eq!(budgets.measured("cuda:0", 80), 80);
        assert_eq!(budgets.measured("cuda:0", 70), 80);
        budgets.close(A);
        assert_eq!(opened(&budgets, C, None), Some(80));
        budgets.close(B);
        budgets.close(C);
        assert_eq!(opened(&budgets, A, None), None);
        assert_eq!(budgets.measured("cuda:0", 90), 90);
        assert_eq!(budgets.open("cuda:1", B, None, "b".into()), None);
    }

    #[test]
    fn no_more_is_promised_than_there_is_and_a_refusal_says_to_whom_the_rest_was() {
        let budgets = Budgets::default();
        for runner in [A, B, C] {
            opened(&budgets, runner, None);
        }
        budgets.measured("cuda:0", 100);
        assert_eq!(budgets.promise(A, 60, None, None), Ok(()));
        let refused = budgets.promise(B, 41, None, None).unwrap_err();
        assert_eq!((refused.room, refused.left()), (100, 40));
        assert_eq!(refused.promised, [("r1".to_owned(), 60)]);
        // Others took 10 of the room since.
        assert_eq!(
            budgets.promise(B, 31, Some(90), None).unwrap_err().left(),
            30
        );
        assert_eq!(budgets.promise(B, 30, Some(90), None), Ok(()));
        // What is taken beyond a promise counts, too.
        budgets.count(A, 70);
        assert_eq!(budgets.promise(C, 1, None, None).unwrap_err().left(), 0);
        budgets.close(A);
        assert_eq!(budgets.promise(C, 70, None, None), Ok(()));
        assert_eq!(
            budgets.promised("cuda:0"),
            [("r2".to_owned(), 30), ("r3".to_owned(), 70)]
        );
    }

    #[test]
    fn a_draft_is_paid_by_its_target_until_that_one_has_a_pool() {
        let budgets = Budgets::default();
        opened(&budgets, A, None);
        budgets.measured("cuda:0", 100);
        budgets.promise(A, 60, None, Some(80)).unwrap();
        budgets.count(A, 20);
        opened(&budgets, B, Some(A));
        assert_eq!(budgets.promise(B, 1000, None, None), Ok(()));
        budgets.count(B, 5);
        let standing = budgets.standing(A).unwrap();
        assert_eq!(
            (standing.room, standing.taken_beside, standing.others),
            (80, 5, 0)
        );
        assert!(standing.by_count); // it has a room of its own
        assert_eq!(budgets.standing(B).unwrap().room, 80);
        assert_eq!(budgets.promised("cuda:0"), [("r1".to_owned(), 60)]);
        budgets.sized(A);
        opened(&budgets, C, Some(A));
        assert_eq!(budgets.standing(C).unwrap().others, 60);
        assert_eq!(budgets.promise(C, 41, None, None).unwrap_err().left(), 40);
        assert!(budgets.standing(A).unwrap().by_count);
        budgets.close(A); // its draft stays
        assert_eq!(
            budgets.promised("cuda:0"),
            [("r2".to_owned(), 5), ("r3".to_owned(), 0)]
        );
    }

    #[test]
    fn a_runner_notes_whether_it_was_ever_in_company() {
        let budgets = Budgets::default();
        opened(&budgets, A, None);
        budgets.measured("cuda:0", 100);
        assert!(!budgets.standing(A).unwrap().by_count);
        opened(&budgets, B, None);
        budgets.close(B);
        assert!(budgets.standing(A).unwrap().by_count);
        assert_eq!(budgets.standing(B), None);
    }
}
