//! One rank's view of the agreement between the ranks of a world, as a Python object.

use distguard_core::agreement::{Agreement as Core, Entry, Stage, Standing};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt};

use crate::convert;
use crate::errors::make;
use crate::exit::wait_detached;

fn stage(text: &str) -> PyResult<Stage> {
    text.parse().map_err(PyValueError::new_err)
}

/// ("open", None), ("passed", None), or ("failed", why).
fn told(standing: Standing) -> (&'static str, Option<String>) {
    match standing {
        Standing::Open => ("open", None),
        Standing::Passed => ("passed", None),
        Standing::Failed(why) => ("failed", Some(why)),
    }
}

/// The agreement between the ranks of one world, as far as this process has read their log.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Agreement {
    core: Core,
}

#[pymethods]
impl Agreement {
    #[new]
    fn new() -> Self {
        Self { core: Core::new() }
    }

    /// Begins work of the calling thread under `name`; returns the number of its round.
    fn begin(&self, py: Python<'_>, name: &str) -> PyResult<u64> {
        let actor = convert::actor(py, Some(name.to_owned()))?;
        let is_alive = |other| convert::is_alive(py, other);
        self.core.begin(name, &actor, is_alive)?.or_else(|other| {
            let details = PyDict::new(py);
            details.set_item("name", name)?;
            details.set_item("thread", &*other.thread_name)?;
            let text = format!(
                "thread {} of this process is working on '{name}' together with the other ranks \
                 now, and they could not tell two threads with the same name apart. Use one \
                 runner from one thread at a time, and give each runner that is built \
                 concurrently its own name, the same on every rank: build_runner(name=...) or \
                 runner_scope(name=...).",
                other.thread_name
            );
            Err(make(py, "AmbiguousBuild", &text, &details)?)
        })
    }

    fn end(&self, name: &str) {
        self.core.end(name);
    }

    fn arrive(&self, name: &str, round: &Bound<'_, PyInt>, stage_name: &str) -> PyResult<bool> {
        let round = convert::whole("round", round)?;
        Ok(self.core.arrive(name, round, stage(stage_name)?))
    }

    fn next(&self) -> u64 {
        self.core.next()
    }

    fn apply(
        &self,
        index: &Bound<'_, PyInt>,
        name: String,
        round: &Bound<'_, PyInt>,
        stage_name: &str,
        failure: Option<String>,
    ) -> PyResult<bool> {
        let entry = Entry {
            name,
            round: convert::whole("round", round)?,
            stage: stage(stage_name)?,
            failure,
        };
        Ok(self.core.apply(convert::whole("index", index)?, entry))
    }

    /// (name, round) that have the turn.
    fn turn(&self) -> Option<(String, u64)> {
        self.core.turn()
    }

    /// Like `stands` of "begin"; if that is passed, this rank has begun its turn.
    fn enter(
        &self,
        name: &str,
        round: &Bound<'_, PyInt>,
    ) -> PyResult<(&'static str, Option<String>)> {
        let round = convert::whole("round", round)?;
        Ok(told(self.core.enter(name, round)))
    }

    fn leave(&self, name: &str, round: &Bound<'_, PyInt>) -> PyResult<()> {
        self.core.leave(name, convert::whole("round", round)?);
        Ok(())
    }

    fn began(&self, name: &str, round: &Bound<'_, PyInt>) -> PyResult<Option<bool>> {
        Ok(self.core.began(name, convert::whole("round", round)?))
    }

    fn read_own(&self, index: &Bound<'_, PyInt>) -> PyResult<()> {
        self.core.read_own(convert::whole("index", index)?);
        Ok(())
    }

    fn wrote(&self, index: &Bound<'_, PyInt>) -> PyResult<bool> {
        Ok(self.core.wrote(convert::whole("index", index)?))
    }

    fn outlived(
        &self,
        name: &str,
        round: &Bound<'_, PyInt>,
        stage_name: &str,
    ) -> PyResult<Vec<u64>> {
        let round = convert::whole("round", round)?;
        Ok(self.core.outlived(name, round, stage(stage_name)?))
    }

    fn lose(&self, reason: &str) {
        self.core.lose(reason);
    }

    fn stands(
        &self,
        name: &str,
        round: &Bound<'_, PyInt>,
        stage_name: &str,
    ) -> PyResult<(&'static str, Option<String>)> {
        let round = convert::whole("round", round)?;
        Ok(told(self.core.stands(name, round, stage(stage_name)?)))
    }

    fn begin_wait(&self, name: &str, round: &Bound<'_, PyInt>, stage_name: &str) -> PyResult<bool> {
        let round = convert::whole("round", round)?;
        Ok(self.core.begin_wait(name, round, stage(stage_name)?))
    }

    fn end_wait(&self, name: &str, round: &Bound<'_, PyInt>, stage_name: &str) -> PyResult<()> {
        let round = convert::whole("round", round)?;
        self.core.end_wait(name, round, stage(stage_name)?);
        Ok(())
    }

    fn next_to_read(&self) -> Option<u64> {
        self.core.next_to_read()
    }

    fn end_reading(&self) {
        self.core.end_reading();
    }

    fn is_reading(&self) -> bool {
        self.core.is_reading()
    }

    fn wait(
        &self,
        py: Python<'_>,
        name: &str,
        round: &Bound<'_, PyInt>,
        stage_name: &str,
        seconds: f64,
    ) -> PyResult<()> {
        let (round, stage) = (convert::whole("round", round)?, stage(stage_name)?);
        let slice = convert::seconds(seconds);
        wait_detached(py, || self.core.wait(name, round, stage, slice));
        Ok(())
    }
}
