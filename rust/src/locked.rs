//! A with block that holds a lock of Python's.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// Holds `lock` in a with block, or raises what `timed_out` returns after `timeout` seconds.
///
/// Native: between the acquisition and the block there is no bytecode at which Ctrl-C could leave
/// the lock held, as there would be in a generator.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Locked {
    lock: Py<PyAny>,
    timeout: f64,
    timed_out: Py<PyAny>,
}

#[pymethods]
impl Locked {
    #[new]
    fn new(lock: Py<PyAny>, timeout: f64, timed_out: Py<PyAny>) -> Self {
        Self {
            lock,
            timeout,
            timed_out,
        }
    }

    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        let given = PyDict::new(py);
        given.set_item(intern!(py, "timeout"), self.timeout)?;
        let lock = self.lock.bind(py);
        let held = lock.call_method(intern!(py, "acquire"), (), Some(&given))?;
        if held.is_truthy()? {
            return Ok(());
        }
        Err(PyErr::from_value(self.timed_out.bind(py).call0()?))
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) -> PyResult<()> {
        let release = intern!(py, "release");
        self.lock.bind(py).call_method0(release).map(drop)
    }
}
