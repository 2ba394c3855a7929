//! The three indexes behind one interface.

use std::{sync::Arc, thread};

use dynamo_kv_router::{
    ConcurrentRadixTreeCompressed,
    indexer::{SyncIndexer, WorkerTask},
    protocols::{
        ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
        KvCacheStoreData, KvCacheStoredBlockData, LocalBlockHash, OverlapScores, RouterEvent,
    },
};
use kv_index::{ChainBlockMap, ChainIndex, SequenceHash};
use kvmesh_core::Tier;
use kvmesh_index::{HolderId, Matches, PrefixIndex};

use crate::stream::{Request, Stream};

/// An index under test. Inputs are in its own form before a clock runs.
pub trait Subject: Send + Sync {
    const NAME: &str;
    /// What one writing thread keeps.
    type Lane;
    /// A whole stream, ready to be applied.
    type Updates: Send;
    /// What one reading thread keeps: the last answer.
    type Answer: Default;

    fn new(workers: u32) -> Self;
    fn lane(&self) -> Self::Lane;
    /// Stores and removes what the request did.
    fn update(&self, lane: &mut Self::Lane, stream: &Stream, request: &Request);
    fn prepare(&self, stream: &Stream) -> Self::Updates;
    /// Applies everything on this thread.
    fn replay(&self, stream: &Stream, updates: Self::Updates);
    fn look(&self, stream: &Stream, request: &Request, answer: &mut Self::Answer);
    /// The sum of the workers' depths.
    fn total(answer: &Self::Answer) -> u64;
}

pub struct Ours {
    index: PrefixIndex,
    engines: Vec<HolderId>,
}

impl Subject for Ours {
    const NAME: &str = "ours";
    type Lane = ();
    type Updates = ();
    type Answer = Matches;

    fn new(workers: u32) -> Self {
        let index = PrefixIndex::new(None);
        let engines = (0..workers)
            .map(|n| {
                index
                    .add_engine(&format!("engine-{n}"), None)
                    .expect("room for an engine")
            })
            .collect();
        Self { index, engines }
    }

    fn lane(&self) {}

    fn update(&self, _: &mut (), stream: &Stream, request: &Request) {
        let engine = self.engines[request.worker as usize];
        if !request.stored.is_empty() {
            let hashes = &stream.hashes[request.stored.clone()];
            self.index
                .store(engine, hashes, request.parent, Tier::Device)
                .expect("a live engine");
        }
        if !request.removed.is_empty() {
            let hashes = &stream.removed[request.removed.clone()];
            self.index
                .remove(engine, hashes, Tier::Device)
                .expect("a live engine");
        }
    }

    fn prepare(&self, _: &Stream) {}

    fn replay(&self, stream: &Stream, (): ()) {
        for request in &stream.requests {
            self.update(&mut (), stream, request);
        }
    }

    fn look(&self, stream: &Stream, request: &Request, answer: &mut Matches) {
        self.index
            .matches(&stream.hashes[request.prompt.clone()], answer);
    }

    fn total(answer: &Matches) -> u64 {
        answer.iter().map(|found| u64::from(found.depths[0])).sum()
    }
}

/// `LEAN`: its look-up that reports to a closure, here into a list that is kept; else the one that
/// returns a map.
pub struct Chain<const LEAN: bool>(ChainIndex);

#[derive(Default)]
pub struct ChainAnswer {
    map: kv_index::OverlapScores,
    list: Vec<(u32, u32)>,
}

impl<const LEAN: bool> Subject for Chain<LEAN> {
    const NAME: &str = if LEAN {
        "kv-index 2.0.0 score_into"
    } else {
        "kv-index 2.0.0"
    };
    /// What each worker holds.
    type Lane = Vec<ChainBlockMap>;
    type Updates = ();
    type Answer = ChainAnswer;

    fn new(workers: u32) -> Self {
        let index = ChainIndex::with_max_workers(workers as usize);
        for n in 0..workers {
            assert_eq!(
                index
                    .intern_worker(&format!("engine-{n}"))
                    .expect("room for a worker"),
                n
            );
        }
        Self(index)
    }

    fn lane(&self) -> Self::Lane {
        Vec::new()
    }

    fn update(&self, maps: &mut Self::Lane, stream: &Stream, request: &Request) {
        if maps.is_empty() {
            maps.resize_with(stream.workers as usize, ChainBlockMap::new);
        }
        let map = &mut maps[request.worker as usize];
        if !request.stored.is_empty() {
            let blocks = &stream.blocks[request.stored.clone()];
            self.0
                .apply_stored(
                    request.worker,
                    blocks,
                    request.parent.map(SequenceHash),
                    map,
                )
                .expect("the parent is held");
        }
        if !request.removed.is_empty() {
            self.0.apply_removed(
                request.worker,
                &stream.removed_sequence[request.removed.clone()],
                map,
            );
        }
    }

    fn prepare(&self, _: &Stream) {}

    fn replay(&self, stream: &Stream, (): ()) {
        let mut maps = self.lane();
        for request in &stream.requests {
            self.update(&mut maps, stream, request);
        }
    }

    fn look(&self, stream: &Stream, request: &Request, answer: &mut Self::Answer) {
        let contents = &stream.contents[request.prompt.clone()];
        if LEAN {
            answer.list.clear();
            let list = &mut answer.list;
            self.0.score_into(
                contents,
                |content| content.0,
                false,
                |worker, depth| list.push((worker, depth)),
            );
        } else {
            let contents = &stream.peer_contents[request.prompt.clone()];
            answer.map = self.0.find_matches(contents, false);
        }
    }

    fn total(answer: &Self::Answer) -> u64 {
        let depths = answer
            .map
            .scores
            .values()
            .chain(answer.list.iter().map(|(_, depth)| depth));
        depths.map(|&depth| u64::from(depth)).sum()
    }
}

pub struct Crtc(Arc<ConcurrentRadixTreeCompressed>);

/// A worker thread of the index and the queue to it, as its thread pool has them.
pub struct CrtcLane {
    queue: flume::Sender<WorkerTask>,
    event: u64,
}

fn tasks(stream: &Stream, request: &Request, event: &mut u64) -> Vec<WorkerTask> {
    let mut tasks = Vec::with_capacity(2);
    let mut push = |data| {
        *event += 1;
        let event = KvCacheEvent {
            event_id: *event,
            data,
            dp_rank: 0,
        };
        tasks.push(WorkerTask::Event(RouterEvent::new(
            u64::from(request.worker),
            event,
        )));
    };
    if !request.stored.is_empty() {
        let blocks =
            stream.blocks[request.stored.clone()]
                .iter()
                .map(|block| KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(block.seq_hash.0),
                    tokens_hash: LocalBlockHash(block.content_hash.0),
                    mm_extra_info: None,
                });
        push(KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: request.parent.map(ExternalSequenceBlockHash),
            start_position: None,
            blocks: blocks.collect(),
        }));
    }
    if !request.removed.is_empty() {
        let hashes = stream.removed[request.removed.clone()].iter();
        push(KvCacheEventData::Removed(KvCacheRemoveData {
            block_hashes: hashes.copied().map(ExternalSequenceBlockHash).collect(),
        }));
    }
    tasks
}

impl Subject for Crtc {
    const NAME: &str = "dynamo-kv-router 1.6.1";
    type Lane = CrtcLane;
    type Updates = flume::Receiver<WorkerTask>;
    type Answer = Option<OverlapScores>;

    fn new(_: u32) -> Self {
        Self(Arc::new(ConcurrentRadixTreeCompressed::new()))
    }

    fn lane(&self) -> CrtcLane {
        let (queue, tasks) = flume::unbounded();
        let index = Arc::clone(&self.0);
        thread::spawn(move || index.worker(tasks, None));
        CrtcLane { queue, event: 0 }
    }

    fn update(&self, lane: &mut CrtcLane, stream: &Stream, request: &Request) {
        for task in tasks(stream, request, &mut lane.event) {
            lane.queue.send(task).expect("the worker thread lives");
        }
        let (done, wait) = tokio::sync::oneshot::channel();
        lane.queue
            .send(WorkerTask::Flush(done))
            .expect("the worker thread lives");
        wait.blocking_recv().expect("the worker thread lives");
    }

    fn prepare(&self, stream: &Stream) -> Self::Updates {
        let (queue, updates) = flume::unbounded();
        let mut event = 0;
        for request in &stream.requests {
            for task in tasks(stream, request, &mut event) {
                queue.send(task).expect("an open queue");
            }
        }
        updates
    }

    fn replay(&self, _: &Stream, updates: Self::Updates) {
        self.0
            .worker(updates, None)
            .expect("a worker that ends with its queue");
    }

    fn look(&self, stream: &Stream, request: &Request, answer: &mut Self::Answer) {
        *answer = Some(
            self.0
                .find_matches(&stream.contents[request.prompt.clone()], false),
        );
    }

    fn total(answer: &Self::Answer) -> u64 {
        answer
            .iter()
            .flat_map(|scores| scores.scores.values())
            .map(|&depth| u64::from(depth))
            .sum()
    }
}
