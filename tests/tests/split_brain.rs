//! Kinds of split brain, with real processes: sides that went on by themselves, directories that come back from a copy,
//! and more than one primary.
//!
//! Each kind is a row: what leads to it, how each side shows that it does not go on, what an operator does about it, and
//! whose content is on both sides in the end. Until the operator has spoken nothing is overwritten: each side holds, bit
//! by bit, what it held before the sides met.
//!
//! `UNDERSTUDY_BIN_DIR` names the binaries to test, `UNDERSTUDY_SEED` replays a run. Each tenth of `UNDERSTUDY_ROUNDS` is
//! one more round of each kind, with other writes.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rand::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use understudy_common::proxy::Link;
use understudy_proto::v1::{self, AckRule, AwayRule};
use understudy_tests::process::{PATIENCE, Role, duo::Duo, seed};

const VOLUME: &str = "data";
const BLOCKS: u64 = 512;
/// Rounds asked for, for one round of a kind.
const ROUNDS_PER_ROUND: u32 = 10;
const LOOK: Duration = Duration::from_millis(10);

/// One kind of split brain.
struct Kind<F, C> {
    /// Leads to it. The links are open behind it.
    fork: F,
    /// What each node is behind the fork, and how it shows that it does not go on.
    sides: &'static [(usize, Role, Shows)],
    /// The operator's word, up to the nodes in their new roles.
    choose: C,
    /// The primary in the end.
    primary: usize,
    /// Whose content is on both sides in the end.
    content: usize,
}

/// How a node shows that it does not go on with another one: in its status, in an event, and in words.
enum Shows {
    /// A primary that was superseded: it refuses clients.
    Fenced,
    /// Split brain, until somebody resolves it.
    Split,
    /// Another reason, which has these words.
    Refuses(&'static [&'static str]),
    /// It refuses somebody, for a reason that has these words, and goes on with its own peer.
    Keeps(&'static [&'static str]),
    /// It was not asked and has nobody to ask.
    Nothing,
}

/// The nodes, and what decides the writes.
struct Scene {
    duo: Duo,
    rng: Pcg64Mcg,
    stamp: u64,
}

impl Scene {
    async fn start(seed: u64) -> Result<Self> {
        let mut scene = Self { duo: Duo::start().await?, rng: Pcg64Mcg::seed_from_u64(seed), stamp: 0 };
        scene.duo.create_volume(0, VOLUME, BLOCKS, AckRule::Staged, AwayRule::Degrade).await?;
        scene.write(0, 0..64).await?;
        scene.duo.until_joined(0).await?;
        Ok(scene)
    }

    /// A few blocks of a range, each with a stamp of its own.
    async fn write(&mut self, node: usize, blocks: Range<u64>) -> Result<()> {
        for _ in 0..self.rng.random_range(8..24) {
            self.stamp += 1;
            let block = self.rng.random_range(blocks.clone());
            self.duo.write(node, VOLUME, block, self.stamp).await.with_context(|| format!("node {node}"))?;
        }
        Ok(())
    }

    fn set_links(&self, link: Link) {
        self.duo.doors.iter().for_each(|door| door.set(link));
    }

    /// Cuts the links; the primary 0 knows it.
    async fn isolate(&self) -> Result<()> {
        self.set_links(Link::Cut);
        let lost = |s: &v1::Status| s.link.as_ref().is_some_and(|link| link.state != "attached");
        self.duo.until(0, "link lost", lost).await.map(drop)
    }

    async fn promote(&mut self, node: usize) -> Result<()> {
        self.duo.promote(node, v1::PromoteRequest { force: true, ..Default::default() }).await?;
        self.duo.again(node, Role::Primary).await
    }

    /// What it held and the other side did not, in bytes.
    async fn demote(&mut self, node: usize) -> Result<u64> {
        let demoted = self.duo.replication(node)?.demote(v1::DemoteRequest::default()).await?.into_inner();
        self.duo.again(node, Role::Backup).await?;
        Ok(demoted.unshipped_bytes)
    }

    /// `understudy resolve --discard` of a side that is a primary or a backup; it is a backup then.
    async fn give_up(&mut self, node: usize, role: Role) -> Result<()> {
        let request = v1::ResolveSplitBrainRequest::default();
        match role {
            Role::Primary => self.duo.replication(node)?.resolve_split_brain(request).await?,
            Role::Backup => self.duo.backup(node)?.resolve_split_brain(request).await?,
        };
        self.duo.again(node, Role::Backup).await
    }

    /// Promotes the backup, and the old primary as well: two generations of one number.
    async fn split(&mut self) -> Result<()> {
        self.isolate().await?;
        self.promote(1).await?;
        self.demote(0).await?;
        self.promote(0).await
    }

    async fn status(&self, node: usize, role: Role) -> Result<v1::Status> {
        let request = v1::GetStatusRequest {};
        Ok(match role {
            Role::Primary => self.duo.replication(node)?.get_status(request).await?.into_inner(),
            Role::Backup => self.duo.backup(node)?.get_status(request).await?.into_inner(),
        })
    }

    /// Waits for an event of a kind whose message has all `words`.
    async fn until_event(&self, node: usize, role: Role, kind: &str, words: &[&str]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let events = self.duo.events(node, role).await?;
            let fits = |event: &&v1::Event| event.kind == kind && words.iter().all(|word| event.message.contains(word));
            if events.iter().any(|event| fits(&event)) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "node {node}: no {kind} with {words:?} in {events:#?}");
        }
    }

    /// Waits until the status says that a link is refused, in all `words`.
    async fn until_refused(&self, node: usize, role: Role, words: &[&str]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let link = self.status(node, role).await?.link.unwrap_or_default();
            if link.state == "refused" && words.iter().all(|word| link.reason.contains(word)) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "node {node}: no refusal with {words:?}: {link:?}");
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn until_shown(&self, node: usize, role: Role, shows: &Shows) -> Result<()> {
        match shows {
            Shows::Fenced => {
                // A write before that would be taken.
                self.duo.until(node, "fenced", |status| status.fenced_by > 0).await?;
                let refused = self.duo.until_fenced(node, VOLUME, 0, u64::MAX).await?;
                for word in ["superseded", "understudy resolve --list", "understudy demote"] {
                    ensure!(refused.message().contains(word), "node {node}: {refused:?}");
                }
                self.until_event(node, role, "role.fenced", &[]).await?;
                // It goes on asking, and is refused each time; the restart of a check changes nothing either.
                let events = self.duo.events(node, role).await?;
                let fenced = events.iter().filter(|event| event.kind == "role.fenced").count();
                ensure!(fenced == 1, "node {node} was fenced once, and {fenced} events say so");
                Ok(())
            }
            Shows::Split => {
                let words = ["split brain", "understudy resolve"];
                self.until_refused(node, role, &words).await?;
                self.until_event(node, role, "split_brain.detected", &words).await
            }
            Shows::Refuses(words) => {
                self.until_refused(node, role, words).await?;
                self.until_event(node, role, "link.refused", words).await
            }
            Shows::Keeps(words) => {
                self.until_event(node, role, "link.refused", words).await?;
                let link = self.status(node, role).await?.link.unwrap_or_default();
                ensure!(link.state == "attached", "node {node} has lost its own peer: {link:?}");
                Ok(())
            }
            Shows::Nothing => Ok(()),
        }
    }

    /// The image of a side; of one that serves nobody, the one in its directory.
    async fn held(&mut self, node: usize, role: Role, shows: &Shows) -> Result<Vec<u8>> {
        match shows {
            Shows::Fenced => self.duo.image_at_rest(node, role, VOLUME).await,
            _ => self.duo.image(node, role, VOLUME).await,
        }
    }
}

async fn run(kind: Kind<impl AsyncFn(&mut Scene) -> Result<()>, impl AsyncFn(&mut Scene) -> Result<()>>) -> Result<()> {
    let rounds = std::env::var("UNDERSTUDY_ROUNDS").ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or_default();
    let seed = seed(1);
    for seed in seed..=seed + u64::from(rounds / ROUNDS_PER_ROUND) {
        round(&kind, seed).await.with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

async fn round(
    kind: &Kind<impl AsyncFn(&mut Scene) -> Result<()>, impl AsyncFn(&mut Scene) -> Result<()>>,
    seed: u64,
) -> Result<()> {
    let mut scene = Scene::start(seed).await?;
    (kind.fork)(&mut scene).await.context("the way to the fork")?;
    let mut before = Vec::new();
    for (node, role, _) in kind.sides {
        before.push(scene.duo.image(*node, *role, VOLUME).await.with_context(|| format!("node {node} before"))?);
    }
    scene.set_links(Link::Open);
    for (node, role, shows) in kind.sides {
        scene.until_shown(*node, *role, shows).await?;
    }
    for ((node, role, shows), before) in kind.sides.iter().zip(&before) {
        let held = scene.held(*node, *role, shows).await.with_context(|| format!("node {node} behind"))?;
        ensure!(held == *before, "node {node} was changed and nobody had said so");
        // Also behind the restart that this may have taken.
        scene.until_shown(*node, *role, shows).await?;
    }
    (kind.choose)(&mut scene).await.context("the operator's word")?;
    scene.duo.until_joined(kind.primary).await?;
    let image = scene.duo.identical(kind.primary, VOLUME).await?;
    let Some(at) = kind.sides.iter().position(|(node, ..)| *node == kind.content) else { bail!("no such side") };
    ensure!(image == before[at], "not the content of node {}", kind.content);
    // And the pair goes on.
    scene.write(kind.primary, 0..BLOCKS).await?;
    scene.duo.until_joined(kind.primary).await?;
    scene.duo.identical(kind.primary, VOLUME).await.map(drop)
}

const SUPERSEDED: &[(usize, Role, Shows)] =
    &[(0, Role::Primary, Shows::Fenced), (1, Role::Primary, Shows::Refuses(&["superseded", "understudy demote"]))];
const SPLIT: &[(usize, Role, Shows)] = &[(0, Role::Primary, Shows::Split), (1, Role::Primary, Shows::Split)];
/// Node 0 runs on an old copy of the primary's directory, which the backup notices.
const OLD_COPY: &[(usize, Role, Shows)] = &[
    (0, Role::Primary, Shows::Refuses(&["old copy", "understudy resolve"])),
    (1, Role::Backup, Shows::Refuses(&["old copy", "understudy resolve"])),
];

#[tokio::test(flavor = "multi_thread")]
async fn promoted_while_the_old_primary_goes_on_alone() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.isolate().await?;
        scene.write(0, 0..BLOCKS).await?;
        scene.promote(1).await?;
        scene.write(0, 0..BLOCKS).await?;
        scene.write(1, 0..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| scene.demote(0).await.map(drop);
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 1, content: 1 }).await
}

/// The operator wants what the old primary holds, so that is promoted as well, and the other side gives up.
#[tokio::test(flavor = "multi_thread")]
async fn promoted_and_the_old_primary_is_chosen() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.isolate().await?;
        scene.promote(1).await?;
        scene.write(0, 0..BLOCKS).await?;
        scene.write(1, 0..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| {
        // Otherwise the new primary fills it as soon as it is a backup.
        scene.set_links(Link::Cut);
        scene.demote(0).await?;
        scene.promote(0).await?;
        scene.set_links(Link::Open);
        scene.until_shown(0, Role::Primary, &Shows::Split).await?;
        scene.give_up(1, Role::Primary).await
    };
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 0, content: 0 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn both_wrote_the_same_blocks() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.split().await?;
        scene.write(0, 10..14).await?;
        scene.write(1, 10..14).await
    };
    let choose = async |scene: &mut Scene| scene.give_up(0, Role::Primary).await;
    run(Kind { fork, sides: SPLIT, choose, primary: 1, content: 1 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn both_wrote_different_blocks() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.split().await?;
        scene.write(0, 0..200).await?;
        scene.write(1, 200..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| scene.give_up(1, Role::Primary).await;
    run(Kind { fork, sides: SPLIT, choose, primary: 0, content: 0 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_promoted_side_wrote_nothing_and_the_old_one_did() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.isolate().await?;
        scene.promote(1).await?;
        scene.write(0, 0..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| {
        ensure!(scene.demote(0).await? > 0, "what it had written is not told");
        Ok(())
    };
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 1, content: 1 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_old_side_wrote_nothing_since_but_had_acknowledged_what_it_never_shipped() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.set_links(Link::Cut);
        scene.write(0, 0..BLOCKS).await?;
        scene.promote(1).await?;
        scene.write(1, 0..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| {
        ensure!(scene.demote(0).await? > 0, "what it had acknowledged is not told");
        Ok(())
    };
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 1, content: 1 }).await
}

/// Nothing is lost whoever gives way, so there is nothing to resolve; but a superseded primary becomes a backup by
/// `demote` only, and the failback then moves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn neither_side_wrote_so_demotion_alone_joins_them() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.isolate().await?;
        scene.promote(1).await
    };
    let choose = async |scene: &mut Scene| {
        ensure!(scene.demote(0).await? == 0, "something is told that nobody wrote");
        scene.duo.until_joined(1).await?;
        let events = scene.duo.events(1, Role::Primary).await?;
        let runs: Vec<_> = events.iter().filter(|event| event.kind == "run.committed").collect();
        let nothing = |event: &&v1::Event| event.fields.get("done_bytes").is_some_and(|bytes| bytes == "0");
        ensure!(!runs.is_empty() && runs.iter().all(nothing), "a run moved what was on both sides: {runs:#?}");
        Ok(())
    };
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 1, content: 1 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn forked_within_a_run() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.isolate().await?;
        scene.duo.until(0, "delta", |s| s.volumes.iter().all(|v| v.mode() == v1::Mode::Delta)).await?;
        for block in 0..BLOCKS {
            scene.stamp += 1;
            scene.duo.write(0, VOLUME, block, scene.stamp).await?;
        }
        scene.duo.doors[1].set(Link::Slow(64 << 10));
        let deadline = Instant::now() + PATIENCE;
        while scene.status(1, Role::Backup).await?.volumes.iter().all(|v| v.phase() != v1::Phase::Round) {
            ensure!(Instant::now() < deadline, "no run has come to the backup");
            tokio::time::sleep(LOOK).await;
        }
        scene.set_links(Link::Cut);
        scene.promote(1).await?;
        scene.write(0, 0..BLOCKS).await?;
        scene.write(1, 0..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| scene.demote(0).await.map(drop);
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 1, content: 1 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_old_primary_was_killed_and_started_before_the_link_came_back() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.isolate().await?;
        scene.write(0, 0..BLOCKS).await?;
        scene.promote(1).await?;
        scene.write(1, 0..BLOCKS).await?;
        scene.duo.kill(0);
        scene.duo.run(0, Role::Primary).await?;
        scene.write(0, 0..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| scene.demote(0).await.map(drop);
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 1, content: 1 }).await
}

/// Each side has been promoted twice since: the same numbers, and other generations.
#[tokio::test(flavor = "multi_thread")]
async fn both_sides_were_promoted_twice() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.split().await?;
        for node in [0, 1] {
            scene.write(node, 0..BLOCKS).await?;
            scene.demote(node).await?;
            scene.promote(node).await?;
            scene.write(node, 0..BLOCKS).await?;
            let generation = scene.status(node, Role::Primary).await?.generation;
            ensure!(generation == 3, "node {node} has generation {generation}");
        }
        Ok(())
    };
    let choose = async |scene: &mut Scene| scene.give_up(0, Role::Primary).await;
    run(Kind { fork, sides: SPLIT, choose, primary: 1, content: 1 }).await
}

/// Kills the primary 0, keeps a copy, and lets the pair go on.
async fn copy_and_go_on(scene: &mut Scene) -> Result<std::path::PathBuf> {
    scene.duo.kill(0);
    let copy = scene.duo.copy_of(0, "copy")?;
    scene.duo.run(0, Role::Primary).await?;
    scene.write(0, 0..BLOCKS).await?;
    scene.duo.until_joined(0).await?;
    Ok(copy)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_primary_is_started() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        let copy = copy_and_go_on(scene).await?;
        scene.duo.kill(0);
        scene.duo.put_back(0, &copy)?;
        scene.duo.run(0, Role::Primary).await
    };
    // The backup has the newer content: it is the primary from now on.
    let choose = async |scene: &mut Scene| {
        scene.give_up(0, Role::Primary).await?;
        scene.promote(1).await
    };
    run(Kind { fork, sides: OLD_COPY, choose, primary: 1, content: 1 }).await
}

/// By the time the sides meet, its journal is longer than what the backup has.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_primary_went_on_alone() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        let copy = copy_and_go_on(scene).await?;
        scene.duo.kill(0);
        scene.set_links(Link::Cut);
        scene.duo.put_back(0, &copy)?;
        scene.duo.run(0, Role::Primary).await?;
        for _ in 0..8 {
            scene.write(0, 0..BLOCKS).await?;
        }
        scene.duo.kill(0);
        scene.duo.run(0, Role::Primary).await?;
        scene.write(0, 0..BLOCKS).await
    };
    // What it wrote is chosen: the backup gives up.
    let choose = async |scene: &mut Scene| scene.give_up(1, Role::Backup).await;
    run(Kind { fork, sides: OLD_COPY, choose, primary: 0, content: 0 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_is_started_when_the_pair_has_another_primary() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        let copy = copy_and_go_on(scene).await?;
        scene.isolate().await?;
        scene.promote(1).await?;
        scene.demote(0).await?;
        scene.set_links(Link::Open);
        scene.duo.until_joined(1).await?;
        scene.write(1, 0..BLOCKS).await?;
        scene.duo.until_joined(1).await?;
        scene.set_links(Link::Cut);
        scene.duo.kill(0);
        scene.duo.put_back(0, &copy)?;
        scene.duo.run(0, Role::Primary).await?;
        scene.write(0, 0..BLOCKS).await
    };
    let choose = async |scene: &mut Scene| scene.demote(0).await.map(drop);
    run(Kind { fork, sides: SUPERSEDED, choose, primary: 1, content: 1 }).await
}

/// A promoted side is lost, comes back from a copy from before its promotion, and is promoted again: the same number.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_backup_is_promoted_again() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.set_links(Link::Cut);
        scene.duo.kill(1);
        let copy = scene.duo.copy_of(1, "copy")?;
        scene.duo.run(1, Role::Backup).await?;
        scene.promote(1).await?;
        scene.demote(0).await?;
        scene.set_links(Link::Open);
        scene.duo.until_joined(1).await?;
        scene.write(1, 0..BLOCKS).await?;
        scene.duo.until_joined(1).await?;
        scene.set_links(Link::Cut);
        scene.duo.kill(1);
        scene.duo.put_back(1, &copy)?;
        scene.duo.run(1, Role::Backup).await?;
        scene.promote(1).await?;
        scene.write(1, 0..BLOCKS).await
    };
    // The copy is worth less than the other side.
    let choose = async |scene: &mut Scene| {
        scene.give_up(1, Role::Primary).await?;
        scene.promote(0).await
    };
    let sides = &[(0, Role::Backup, Shows::Split), (1, Role::Primary, Shows::Split)];
    run(Kind { fork, sides, choose, primary: 0, content: 0 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_primaries_attach_to_one_backup() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.duo.kill(0);
        let copy = scene.duo.copy_of(0, "copy")?;
        scene.duo.run(0, Role::Primary).await?;
        scene.duo.until_joined(0).await?;
        // A second process on a copy of the directory: the same pair, the same node, the same generation.
        scene.duo.put_back(2, &copy)?;
        scene.duo.peers[2] = 1;
        scene.duo.run(2, Role::Primary).await?;
        scene.until_refused(2, Role::Primary, &["copy"]).await?;
        scene.write(2, 0..BLOCKS).await?;
        scene.write(0, 0..BLOCKS).await?;
        scene.duo.until_joined(0).await.map(drop)
    };
    let sides = &[
        (0, Role::Primary, Shows::Nothing),
        (1, Role::Backup, Shows::Keeps(&["copy"])),
        (2, Role::Primary, Shows::Refuses(&["copy"])),
    ];
    let choose = async |scene: &mut Scene| {
        scene.duo.kill(2);
        Ok(())
    };
    run(Kind { fork, sides, choose, primary: 0, content: 0 }).await
}

/// A third node has taken the place of a dead backup and was promoted; then the dead one returns, and somebody promotes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_backup_returns_and_is_promoted_as_well() -> Result<()> {
    let fork = async |scene: &mut Scene| {
        scene.duo.kill(1);
        scene.write(0, 0..BLOCKS).await?;
        scene.duo.kill(0);
        (scene.duo.peers[0], scene.duo.peers[2]) = (2, 1);
        scene.duo.run(2, Role::Backup).await?;
        scene.duo.run(0, Role::Primary).await?;
        scene.duo.until_joined(0).await?;
        scene.duo.identical(0, VOLUME).await?;
        scene.set_links(Link::Cut);
        scene.duo.kill(0);
        scene.promote(2).await?;
        scene.write(2, 0..BLOCKS).await?;
        scene.duo.peers[1] = 2;
        scene.duo.run(1, Role::Backup).await?;
        scene.promote(1).await?;
        scene.write(1, 0..BLOCKS).await
    };
    let sides = &[(1, Role::Primary, Shows::Split), (2, Role::Primary, Shows::Split)];
    let choose = async |scene: &mut Scene| scene.give_up(1, Role::Primary).await;
    run(Kind { fork, sides, choose, primary: 2, content: 2 }).await
}
