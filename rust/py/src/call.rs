//! Calls into the core: the GIL is released, signals are answered, progress is told, panics become exceptions.

use crate::error::{to_py, InternalError};
use pyo3::prelude::*;
use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use vqrs_core::pool::Context;
use vqrs_core::Result;

/// How often a long call looks at signals and tells progress.
const TICK: Duration = Duration::from_millis(50);

fn panicked(cause: Box<dyn Any + Send>) -> PyErr {
    let text = cause.downcast_ref::<String>().map(String::as_str).or_else(|| cause.downcast_ref::<&str>().copied());
    InternalError::new_err(format!("internal error, please report it: {}", text.unwrap_or("no message")))
}

/// A call too short to release the GIL for.
pub fn short<T>(work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(work)).map_err(panicked)?.map_err(to_py)
}

/// A call of a few milliseconds: without the GIL, on this thread.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work))).map_err(panicked)?.map_err(to_py)
}

/// A call that may last, of work whose checks are mostly made on this thread: without the GIL and on this thread, which
/// answers Ctrl-C where `ctx`, made by [`watched`], is checked.
pub fn answering<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let outcome = detached(py, work);
    PyErr::take(py).map_or(outcome, Err)
}

/// A context for [`answering`].
pub fn watched(ctx: Context) -> Context {
    ctx.watched(|| {
        Python::attach(|py| match py.check_signals() {
            Ok(()) => false,
            // Until this thread is back: see `answering`.
            Err(error) => {
                error.restore(py);
                true
            }
        })
    })
}

/// A call that can last: `work` runs on a thread of its own while this one waits for it, answers Ctrl-C by cancelling
/// `ctx`, and calls `progress(stage, done, total)`.
pub fn long<T: Send>(
    py: Python<'_>,
    ctx: &Context,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    let progress = progress.map(|callback| callback.clone().unbind());
    let tell = || {
        Python::attach(|py| {
            py.check_signals()?;
            if let Some(callback) = &progress {
                callback.call1(py, ctx.progress().read())?;
            }
            Ok(())
        })
    };
    // In a place of its own, from which this thread takes it where the system starts no other.
    let work = Mutex::new(Some(work));
    let run = || {
        let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
        work.map(|work| catch_unwind(AssertUnwindSafe(work)))
    };
    let (outcome, failure) = py.detach(|| {
        std::thread::scope(|scope| {
            let (sender, receiver) = channel();
            if std::thread::Builder::new().spawn_scoped(scope, move || sender.send(run())).is_err() {
                return (run(), None);
            }
            let mut failure: Option<PyErr> = None;
            loop {
                match receiver.recv_timeout(TICK) {
                    Ok(outcome) => return (outcome, failure),
                    Err(RecvTimeoutError::Disconnected) => return (None, failure),
                    Err(RecvTimeoutError::Timeout) => {
                        if let (None, Err(error)) = (&failure, tell()) {
                            ctx.cancel();
                            failure = Some(error);
                        }
                    }
                }
            }
        })
    });
    if let Some(failure) = failure {
        return Err(failure);
    }
    let outcome = outcome.ok_or_else(|| InternalError::new_err("internal error: a worker thread was lost"))?;
    let value = outcome.map_err(panicked)?.map_err(to_py)?;
    // The last state, so that a progress bar ends full.
    tell()?;
    Ok(value)
}
