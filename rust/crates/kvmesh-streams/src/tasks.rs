//! The tasks of all streams, run by the caller's thread until each of them waits.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::{
    FutureExt, StreamExt,
    future::{AbortHandle, BoxFuture, abortable},
    stream::FuturesUnordered,
};
use parking_lot::Mutex;

/// Shared by who spawns and who runs.
#[derive(Clone, Default)]
pub struct Tasks(Arc<Shared>);

#[derive(Default)]
struct Shared {
    running: Mutex<FuturesUnordered<BoxFuture<'static, ()>>>,
    spawned: Mutex<Vec<BoxFuture<'static, ()>>>,
    woken: Arc<Woken>,
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

impl Tasks {
    /// A task begins with the next [`Self::run`].
    pub fn spawn(&self, task: impl Future + Send + 'static) {
        let task = task.map(|_| ()).boxed();
        self.0.spawned.lock().push(task);
    }

    /// As [`Self::spawn`]; it can be ended where it waits.
    pub fn spawn_abortable(&self, task: impl Future + Send + 'static) -> AbortHandle {
        let (task, handle) = abortable(task);
        self.spawn(task);
        handle
    }

    /// Returns when every task waits for something.
    pub fn run(&self) {
        let Shared {
            running,
            spawned,
            woken,
        } = &*self.0;
        let mut running = running.lock();
        let waker = Waker::from(Arc::clone(woken));
        let mut context = Context::from_waker(&waker);
        loop {
            running.extend(spawned.lock().drain(..));
            woken.0.store(false, SeqCst);
            let ended = matches!(running.poll_next_unpin(&mut context), Poll::Ready(Some(())));
            if !ended && !woken.0.load(SeqCst) && spawned.lock().is_empty() {
                return;
            }
        }
    }

    /// Drops all tasks.
    pub fn clear(&self) {
        drop(std::mem::take(&mut *self.0.running.lock()));
        drop(std::mem::take(&mut *self.0.spawned.lock()));
    }
}

impl<F: Future + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}
