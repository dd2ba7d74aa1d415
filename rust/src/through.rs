//! The with block of a method for which there is nothing to enter.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// A context manager that does nothing: the code is in a step that covers this one, or belongs to
/// no runner of the guard.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Through;

#[pymethods]
#[allow(clippy::unused_self)]
impl Through {
    fn __enter__(&self) {}

    fn __exit__(
        &self,
        _class: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) {
    }
}

pub fn through(py: Python<'_>) -> PyResult<Py<PyAny>> {
    static THROUGH: PyOnceLock<Py<Through>> = PyOnceLock::new();
    let through = THROUGH.get_or_try_init(py, || Py::new(py, Through))?;
    Ok(through.clone_ref(py).into_any())
}
