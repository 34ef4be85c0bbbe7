//! What the engine must know of a guest, from what its VMM says of it.

use super::{PATIENCE_MAX, PushPlan};
use crate::attach::message::GuestInfo;
use crate::engine::ConfigError;
use crate::engine::source::SourceConfig;
use crate::proto::message::{GUEST_INFO_MAX, TEXT_MAX};
use crate::proto::prepaging::PIVOTS_MAX;
use crate::proto::source::SessionLimits;
use crate::proto::switchover::SwitchoverConfig;
use crate::transport::{LinkOptions, Ticket};

/// What the engine must know, from what the VMM says of its guest.
///
/// # Errors
/// What cannot be said to a destination: a VMM may say more of its guest than fits there.
pub(super) fn config(
    ticket: Ticket,
    plan: PushPlan,
    machine: String,
    guest: GuestInfo,
) -> Result<SourceConfig, ConfigError> {
    let wrong = |field, why| Err(ConfigError::Field { field, why });
    let link = LinkOptions::default();
    // Two streams are not a vCPU's.
    let vcpus_max = link.streams_max.saturating_sub(2);
    if !(1..=vcpus_max).contains(&guest.vcpus) {
        return wrong("vcpus", format!("{} is not in 1 to {vcpus_max}", guest.vcpus));
    }
    for (field, text, most) in
        [("machine", &machine, TEXT_MAX), ("guest", &guest.workload_json, GUEST_INFO_MAX)]
    {
        if text.len() > most {
            return wrong(field, format!("{} bytes are more than {most}", text.len()));
        }
    }
    if let Some(pivots) = plan.pivots
        && !(1..=PIVOTS_MAX).contains(&pivots)
    {
        return wrong("pivots", format!("{pivots} is not in 1 to {PIVOTS_MAX}"));
    }
    let most = SwitchoverConfig::ROUNDS_MAX;
    if !(1..=most).contains(&plan.switchover.rounds) {
        return wrong("rounds", format!("{} is not in 1 to {most}", plan.switchover.rounds));
    }
    let patience = plan.patience();
    if patience.is_zero() || patience > PATIENCE_MAX {
        return wrong("patience", format!("{patience:?} is not in 1 ns to {PATIENCE_MAX:?}"));
    }
    Ok(SourceConfig {
        ticket,
        link,
        limits: SessionLimits { recovery: patience, ..crate::failpoint::limits() },
        policy: plan.policy,
        pivots: plan.pivots,
        drain_after: plan.drain_after,
        switchover: plan.switchover,
        compress: plan.compress,
        machine,
        workload: workload_name(&guest.workload_json),
        guest: guest.workload_json.into_bytes(),
        vcpus: guest.vcpus as u16,
        guest_kind: guest.kind,
    })
}

/// The name of the guest's workload, for the report, if its VMM gives it one.
fn workload_name(description: &str) -> Option<String> {
    let description: serde_json::Value = serde_json::from_str(description).ok()?;
    let pattern = description.pointer("/workload/pattern")?.as_str()?;
    let trace = description.pointer("/trace/name").and_then(|name| name.as_str());
    Some(trace.map_or_else(|| pattern.to_owned(), |name| format!("{pattern}:{name}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::ticket::Host;

    #[test]
    fn a_guest_that_does_not_fit_the_network_protocol_is_refused_by_field() {
        let identity = crate::transport::Identity::generate(u64::from(u32::MAX)).unwrap();
        let host = Host::from(std::net::IpAddr::from([127, 0, 0, 1]));
        let ticket = identity.ticket(host, 1, vec![2]).unwrap();
        let try_with = |vcpus, machine: usize, guest: usize, pivots| {
            let workload_json = "x".repeat(guest);
            let guest = GuestInfo { kind: "none".into(), vcpus, workload_json, pid: 1 };
            let plan = PushPlan { pivots, ..PushPlan::default() };
            match config(ticket.clone(), plan, "x".repeat(machine), guest) {
                Ok(config) => {
                    assert_eq!(u32::from(config.vcpus), vcpus);
                    None
                }
                Err(ConfigError::Field { field, .. }) => Some(field),
                Err(other) => panic!("{other:?}"),
            }
        };
        assert_eq!(try_with(62, TEXT_MAX, GUEST_INFO_MAX, Some(PIVOTS_MAX)), None);
        for vcpus in [0, 63, (1 << 16) + 1] {
            assert_eq!(try_with(vcpus, 0, 0, None), Some("vcpus"));
        }
        assert_eq!(try_with(1, TEXT_MAX + 1, 0, None), Some("machine"));
        assert_eq!(try_with(1, 0, GUEST_INFO_MAX + 1, None), Some("guest"));
        assert_eq!(try_with(1, 0, 0, Some(0)), Some("pivots"));
    }

    #[test]
    fn a_guest_of_any_vmm_may_have_a_workload_without_a_name() {
        let named = r#"{"kind":"kvm","workload":{"pattern":"random","seed":1}}"#;
        assert_eq!(workload_name(named).as_deref(), Some("random"));
        let traced = r#"{"workload":{"pattern":"trace"},"trace":{"name":"redis-a"}}"#;
        assert_eq!(workload_name(traced).as_deref(), Some("trace:redis-a"));
        for other in ["", "not JSON", "{}", "[1]", r#"{"workload":{"pattern":7}}"#] {
            assert_eq!(workload_name(other), None, "{other}");
        }
    }
}
