//! What the tasks wait for (descriptors, times, other threads), behind one descriptor that the caller's loop watches.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use futures_util::future::{Either, select};
use parking_lot::Mutex;
use rustix::{
    event::{
        EventfdFlags,
        epoll::{self, CreateFlags, EventData, EventFlags},
        eventfd,
    },
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};

const TIMER: u64 = 0;
const NEWS: u64 = 1;
/// Descriptors looked at in one turn; what is left makes the next one come at once.
const A_TURN: usize = 64;

/// Belongs to one loop; only [`Self::news`] is for other threads.
pub struct Reactor {
    epoll: OwnedFd,
    timer: OwnedFd,
    news: OwnedFd,
    sources: Mutex<HashMap<u64, Arc<Readiness>>>,
    sleepers: Mutex<Sleepers>,
    next: AtomicU64,
}

#[derive(Default)]
struct Sleepers {
    by_time: BTreeMap<(Instant, u64), Waker>,
    /// What the timer is set to.
    armed: Option<Instant>,
}

impl Reactor {
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let news = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        for (source, token) in [(&timer, TIMER), (&news, NEWS)] {
            epoll::add(&epoll, source, EventData::new_u64(token), EventFlags::IN)?;
        }
        Ok(Self {
            epoll,
            timer,
            news,
            sources: Mutex::default(),
            sleepers: Mutex::default(),
            next: AtomicU64::new(NEWS + 1),
        })
    }

    /// Readable while there is something for [`Self::turn`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Makes the descriptor readable: a task was woken outside of the loop's thread, or is to be looked at again.
    pub fn news(&self) {
        // Fails only when the counter would overflow, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.news, &1u64.to_ne_bytes());
    }

    /// Wakes whoever waits for what has happened. Does not wait.
    pub fn turn(&self) {
        let mut events = [MaybeUninit::uninit(); A_TURN];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Interrupted: the descriptor stays readable.
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events[..], Some(&at_once)) else {
            return;
        };
        for event in events {
            match event.data.u64() {
                TIMER => self.wake_sleepers(),
                NEWS => drop(rustix::io::read(&self.news, &mut [0; 8])),
                token => {
                    let readiness = self.sources.lock().get(&token).cloned();
                    if let Some(readiness) = readiness {
                        readiness.happened(event.flags);
                    }
                }
            }
        }
    }

    /// Watch a descriptor, which must not block, until the source is dropped; close the descriptor before that.
    pub fn watch(self: &Arc<Self>, descriptor: impl AsFd) -> io::Result<Source> {
        let token = self.next.fetch_add(1, Relaxed);
        let readiness = Arc::<Readiness>::default();
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, descriptor, EventData::new_u64(token), flags)?;
        self.sources.lock().insert(token, Arc::clone(&readiness));
        Ok(Source {
            reactor: Arc::clone(self),
            token,
            readiness,
        })
    }

    pub fn sleep_until(self: &Arc<Self>, at: Instant) -> Sleep {
        Sleep {
            reactor: Arc::clone(self),
            key: (at, self.next.fetch_add(1, Relaxed)),
        }
    }

    /// What a future returns, or `TimedOut` after a while.
    pub async fn within<F: Future>(
        self: &Arc<Self>,
        time: Duration,
        future: F,
    ) -> io::Result<F::Output> {
        let sleep = self.sleep_until(Instant::now() + time);
        match select(pin!(future), sleep).await {
            Either::Left((output, _)) => Ok(output),
            Either::Right(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn wake_sleepers(&self) {
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        let mut sleepers = self.sleepers.lock();
        let now = Instant::now();
        while let Some(first) = sleepers.by_time.first_entry() {
            if first.key().0 > now {
                break;
            }
            first.remove().wake();
        }
        sleepers.armed = None;
        let next = sleepers.by_time.keys().next().map(|key| key.0);
        if let Some(at) = next {
            self.arm(&mut sleepers, at);
        }
    }

    fn arm(&self, sleepers: &mut Sleepers, at: Instant) {
        if sleepers.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        sleepers.armed = Some(at);
        // Zero would disarm it.
        let left = at
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            },
        };
        // Fails for values that are none, and this is one.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }
}

/// Whether a descriptor can be read and written, as far as is known.
#[derive(Default)]
struct Readiness {
    read: Mutex<Side>,
    write: Mutex<Side>,
}

#[derive(Default)]
struct Side {
    ready: bool,
    /// Nothing will make it wait again: the other end is gone, or there was an error.
    over: bool,
    waker: Option<Waker>,
}

impl Readiness {
    fn happened(&self, flags: EventFlags) {
        let broken = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let hung_up = broken || flags.contains(EventFlags::RDHUP);
        self.read
            .lock()
            .happened(flags.contains(EventFlags::IN), hung_up);
        self.write
            .lock()
            .happened(flags.contains(EventFlags::OUT), broken);
    }
}

impl Side {
    fn happened(&mut self, ready: bool, over: bool) {
        self.ready |= ready;
        self.over |= over;
        if ready || over {
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
    }
}

/// Which way a descriptor is used.
#[derive(Clone, Copy)]
pub enum Way {
    Read,
    Write,
}

/// A descriptor that is watched.
pub struct Source {
    reactor: Arc<Reactor>,
    token: u64,
    readiness: Arc<Readiness>,
}

impl Source {
    pub fn poll_ready(&self, way: Way, context: &Context<'_>) -> Poll<()> {
        let mut side = self.side(way).lock();
        if side.ready || side.over {
            return Poll::Ready(());
        }
        side.waker = Some(context.waker().clone());
        Poll::Pending
    }

    /// It would wait now: the next event says when not.
    pub fn exhausted(&self, way: Way) {
        self.side(way).lock().ready = false;
    }

    fn side(&self, way: Way) -> &Mutex<Side> {
        match way {
            Way::Read => &self.readiness.read,
            Way::Write => &self.readiness.write,
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.reactor.sources.lock().remove(&self.token);
    }
}

/// Ready from a time on.
pub struct Sleep {
    reactor: Arc<Reactor>,
    key: (Instant, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.key.0 {
            return Poll::Ready(());
        }
        let mut sleepers = self.reactor.sleepers.lock();
        let known = sleepers.by_time.get(&self.key);
        if !known.is_some_and(|waker| waker.will_wake(context.waker())) {
            sleepers.by_time.insert(self.key, context.waker().clone());
            self.reactor.arm(&mut sleepers, self.key.0);
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.reactor.sleepers.lock().by_time.remove(&self.key);
    }
}

impl hyper::rt::Sleep for Sleep {}

/// The reactor's times, for hyper.
#[derive(Clone)]
pub struct Timer(pub Arc<Reactor>);

impl hyper::rt::Timer for Timer {
    fn sleep(&self, time: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep_until(Instant::now() + time)
    }

    fn sleep_until(&self, at: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(self.0.sleep_until(at))
    }
}
