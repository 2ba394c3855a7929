//! The host tier's locks (`src/sync.rs`), every operation a point at which the model checker may let another thread go
//! on. Who takes a lock sees what those saw who had it before.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex as Plain;
use std::time::Instant;

use shuttle::sync;

use crate::arena::{View, adopt, seen};

#[derive(Default)]
pub struct Mutex<T> {
    inner: sync::Mutex<T>,
    view: Plain<View>,
}

pub struct MutexGuard<'a, T> {
    inner: Option<sync::MutexGuard<'a, T>>,
    mutex: &'a Mutex<T>,
}

impl<T> Mutex<T> {
    pub fn new(value: T) -> Self {
        Self {
            inner: sync::Mutex::new(value),
            view: Plain::default(),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        let inner = self.inner.lock().unwrap();
        adopt(&self.view.lock().unwrap());
        MutexGuard {
            inner: Some(inner),
            mutex: self,
        }
    }
}

impl<T> MutexGuard<'_, T> {
    fn leave(&self) {
        *self.mutex.view.lock().unwrap() = seen();
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.inner.as_ref().unwrap()
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().unwrap()
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.leave();
    }
}

#[derive(Default)]
pub struct Condvar(sync::Condvar);

pub struct Waited;

impl Waited {
    pub fn timed_out(&self) -> bool {
        false
    }
}

impl Condvar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        guard.leave();
        let inner = self.0.wait(guard.inner.take().unwrap()).unwrap();
        adopt(&guard.mutex.view.lock().unwrap());
        guard.inner = Some(inner);
    }

    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _: Instant) -> Waited {
        self.wait(guard);
        Waited
    }

    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}
