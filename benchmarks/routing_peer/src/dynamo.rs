//! NVIDIA Dynamo's router under simulation: its published selection code (`dynamo-kv-router` 1.6.1), put together as
//! its own queue does without a threshold: project loads, select, book.
//!
//! It is given the same events as kvmesh's router. Split requests are placed as its prefill router does: the prefill worker
//! by cost with no decode blocks tracked, the decode worker by active blocks alone.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use dynamo_kv_router::{
    ActiveSequencesMultiWorker, DefaultWorkerSelector, KvRouterConfig, LocalBlockHash,
    NoopSequencePublisher, RadixTree, RouterEvent, SchedulingRequest, SequenceRequest,
    WorkerSelectionInput, WorkerSelector,
    protocols::{
        ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
        KvCacheStoreData, KvCacheStoredBlockData, RoutingConstraints, WorkerConfigLike,
        WorkerWithDpRank,
    },
    scheduling::{OverlapSignals, ScheduleMode, prefill_load_hint_from_effective_tokens},
};
use kvmesh_sim::{
    cluster::Cluster,
    router::{Placement, Router},
    trace::Request,
};
use rand::RngCore;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tokio::time::Instant;

struct WorkerConfig {
    blocks: u64,
    taints: HashSet<String>,
}

impl WorkerConfigLike for WorkerConfig {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }

    fn data_parallel_size(&self) -> u32 {
        1
    }

    fn max_num_batched_tokens(&self) -> Option<u64> {
        None
    }

    fn total_kv_blocks(&self) -> Option<u64> {
        Some(self.blocks)
    }

    fn taints(&self) -> &HashSet<String> {
        &self.taints
    }
}

/// One pool of workers with its selector.
struct Pool {
    selector: DefaultWorkerSelector,
    sequences: ActiveSequencesMultiWorker<NoopSequencePublisher>,
    workers: HashMap<u64, WorkerConfig>,
    block_tokens: u32,
    /// Whether prompts waiting to be computed count.
    prefill: bool,
}

impl Pool {
    fn new(
        numbers: std::ops::Range<usize>,
        cluster: &Cluster,
        config: KvRouterConfig,
        kind: &'static str,
        seed: u64,
    ) -> Self {
        let ranks = numbers
            .clone()
            .map(|number| (number as u64, (0, 1)))
            .collect();
        let config_of = |number: usize| {
            let taints = HashSet::new();
            (
                number as u64,
                WorkerConfig {
                    blocks: u64::from(cluster.shape.blocks),
                    taints,
                },
            )
        };
        let block_tokens = cluster.shape.block_tokens;
        Self {
            selector: DefaultWorkerSelector::new_seeded(Some(config), kind, seed),
            sequences: ActiveSequencesMultiWorker::new_without_expiry(
                NoopSequencePublisher,
                block_tokens as usize,
                ranks,
                false,
                0,
                kind,
            ),
            workers: numbers.map(config_of).collect(),
            block_tokens,
            prefill: kind != "decode",
        }
    }

    /// Selects a worker and books the request on it.
    fn place(
        &mut self,
        id: usize,
        isl: usize,
        sequence: Option<Vec<u64>>,
        depths: &[(u64, u32)],
    ) -> usize {
        let now = Instant::now();
        let mut overlap = OverlapSignals::default();
        for &(worker, depth) in depths {
            let worker = WorkerWithDpRank::from_worker_id(worker);
            overlap
                .tier_overlap_blocks
                .device
                .insert(worker, depth as usize);
            overlap
                .effective_overlap_blocks
                .insert(worker, f64::from(depth));
            overlap
                .effective_cached_tokens
                .insert(worker, depth as usize * self.block_tokens as usize);
        }
        let request = SchedulingRequest {
            mode: ScheduleMode::Tracked {
                request_id: id.to_string(),
            },
            worker_loads: self
                .sequences
                .project_worker_loads(sequence.as_deref(), now),
            token_seq: sequence,
            isl_tokens: isl,
            lora_name: None,
            expected_output_tokens: None,
            affinity_target: None,
            pinned_worker: None,
            allowed_worker_ids: None,
            routing_constraints: RoutingConstraints::default(),
            router_config_override: None,
            track_prefill_tokens: self.prefill,
            priority_jump: 0.0,
            strict_priority: 0,
            policy_class: None,
            session_context: None,
            overlap,
            kv_transfer_candidates: None,
            retain_kv_transfer_chain: false,
            shared_cache_hits: None,
            resp_tx: None,
        };
        let input = WorkerSelectionInput::configured(
            &self.workers,
            &request,
            request.eligibility(),
            self.block_tokens,
        );
        let selected = self.selector.select_worker(input).expect("a worker");
        let uncached = isl - selected.cached_tokens.min(isl);
        let hint = prefill_load_hint_from_effective_tokens(isl, uncached)
            .ok()
            .filter(|_| uncached > 0);
        let booking = SequenceRequest {
            request_id: id.to_string(),
            token_sequence: request.token_seq,
            track_prefill_tokens: self.prefill,
            expected_output_tokens: None,
            prefill_load_hint: if self.prefill { hint } else { None },
            worker: selected.worker,
            lora_name: None,
        };
        self.sequences.add_request(booking, now).expect("a booking");
        selected.worker.worker_id as usize
    }
}

/// Dynamo's router.
pub struct Dynamo {
    tree: RadixTree,
    /// Aggregated workers, or prefill workers.
    first: Pool,
    decode: Option<Pool>,
    events: u64,
    unique: ChaCha8Rng,
}

impl Dynamo {
    /// With its defaults, but for the scale of prefill load.
    pub fn new(cluster: &Cluster, prefill_load_scale: f64, seed: u64) -> Self {
        let config = KvRouterConfig {
            prefill_load_scale,
            ..KvRouterConfig::default()
        };
        let split = cluster.aggregated == 0;
        let firsts = if split {
            0..cluster.prefill
        } else {
            0..cluster.aggregated
        };
        let kind = if split { "prefill" } else { "aggregated" };
        let first_config = KvRouterConfig {
            router_track_active_blocks: !split,
            ..config.clone()
        };
        let decode_config = KvRouterConfig {
            overlap_score_credit: 0.0,
            router_assume_kv_reuse: false,
            ..config
        };
        Self {
            tree: RadixTree::new(),
            first: Pool::new(firsts, cluster, first_config, kind, seed),
            decode: split.then(|| {
                let numbers = cluster.prefill..cluster.workers();
                Pool::new(numbers, cluster, decode_config, "decode", seed)
            }),
            events: 0,
            unique: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    fn apply(&mut self, worker: usize, data: KvCacheEventData) {
        self.events += 1;
        let event = KvCacheEvent {
            event_id: self.events,
            data,
            dp_rank: 0,
        };
        let applied = self
            .tree
            .apply_event(RouterEvent::new(worker as u64, event));
        debug_assert!(applied.is_ok());
    }
}

impl Router for Dynamo {
    fn arrived(
        &mut self,
        _now: f64,
        id: usize,
        request: &Request,
        placements: &mut Vec<Placement>,
    ) {
        let isl = request.prompt as usize;
        let local = request
            .chain
            .iter()
            .map(|&hash| LocalBlockHash(hash))
            .collect();
        let scores = self.tree.find_matches(local, false).scores;
        let depths: Vec<_> = scores
            .into_iter()
            .map(|(worker, depth)| (worker.worker_id, depth))
            .collect();
        let sequence = self.decode.is_none().then(|| request.chain.to_vec());
        let prefill = self.first.place(id, isl, sequence, &depths);
        let decode = match &mut self.decode {
            None => prefill,
            Some(pool) => {
                // Without assumed reuse its blocks are all different.
                let blocks = request.prompt.div_ceil(pool.block_tokens);
                let sequence = (0..blocks).map(|_| self.unique.next_u64()).collect();
                pool.place(id, isl, Some(sequence), &[])
            }
        };
        placements.push(Placement {
            request: id,
            prefill,
            decode,
        });
    }

    fn prefilled(&mut self, _now: f64, id: usize, _placements: &mut Vec<Placement>) {
        let (id, now) = (id.to_string(), Instant::now());
        let done = match self.decode {
            None => self.first.sequences.mark_prefill_completed(&id, now),
            Some(_) => self.first.sequences.free(&id, now),
        };
        debug_assert!(done.is_ok());
    }

    fn finished(&mut self, _now: f64, id: usize, _output: u32, _placements: &mut Vec<Placement>) {
        let pool = self.decode.as_ref().unwrap_or(&self.first);
        let done = pool.sequences.free(&id.to_string(), Instant::now());
        debug_assert!(done.is_ok());
    }

    fn stored(&mut self, _now: f64, worker: usize, chain: &Rc<[u64]>, from: usize, to: usize) {
        let block = |&hash: &u64| KvCacheStoredBlockData {
            block_hash: ExternalSequenceBlockHash(hash),
            tokens_hash: LocalBlockHash(hash),
            mm_extra_info: None,
        };
        let data = KvCacheStoreData {
            parent_hash: from
                .checked_sub(1)
                .map(|at| ExternalSequenceBlockHash(chain[at])),
            start_position: None,
            blocks: chain[from..to].iter().map(block).collect(),
        };
        self.apply(worker, KvCacheEventData::Stored(data));
    }

    fn removed(&mut self, _now: f64, worker: usize, hashes: &[u64]) {
        let block_hashes = hashes
            .iter()
            .map(|&hash| ExternalSequenceBlockHash(hash))
            .collect();
        self.apply(
            worker,
            KvCacheEventData::Removed(KvCacheRemoveData { block_hashes }),
        );
    }
}
