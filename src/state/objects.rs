//! Services and EndpointSlices by Service, since every question is about one Service with its slices:
//! answering it is one look-up, and going through all of them none.
//!
//! There are tens of thousands, so that what is kept for each decides how much memory the program
//! takes: lists are no longer than what is in them, and a name is stored once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::contribution::PortSlots;
use crate::model::{EndpointSlice, NamespacedName, Service};

/// An object and the listing that named it last.
#[derive(Clone, Debug)]
pub(super) struct Known<T> {
    pub(super) object: T,
    pub(super) listing: u32,
}

/// What there is under the name of a Service. A slice can arrive before its Service.
#[derive(Clone, Debug, Default)]
pub(super) struct Holding {
    pub(super) service: Option<Known<Service>>,
    /// Sorted by name.
    slices: Vec<Known<EndpointSlice>>,
    /// The numbering of its backends, as of the last contribution.
    pub(super) slots: PortSlots,
}

impl Holding {
    pub(super) fn slices(&self) -> Vec<&EndpointSlice> {
        self.slices.iter().map(|known| &known.object).collect()
    }

    fn find(&self, slice: &NamespacedName) -> Result<usize, usize> {
        self.slices.binary_search_by(|known| known.object.name.cmp(slice))
    }
}

/// All of them. A copy shares what is under each name until one side changes it, so that it costs
/// little and takes little memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Objects {
    by_service: BTreeMap<NamespacedName, Arc<Holding>>,
    /// The Service of every slice.
    owners: HashMap<NamespacedName, NamespacedName>,
    services: usize,
}

impl Objects {
    /// How many Services there are.
    pub(super) fn service_count(&self) -> usize {
        self.services
    }

    /// How many slices there are.
    pub(super) fn slice_count(&self) -> usize {
        self.owners.len()
    }

    /// What there is under the name of a Service.
    pub(super) fn holding(&mut self, name: &NamespacedName) -> Option<&mut Holding> {
        self.by_service.get_mut(name).map(Arc::make_mut)
    }

    /// Every Service by name, with its slices.
    pub(super) fn services(&self) -> impl Iterator<Item = (&NamespacedName, &Holding, &Service)> {
        self.by_service.iter().filter_map(|(name, holding)| {
            Some((name, &**holding, &holding.service.as_ref()?.object))
        })
    }

    /// The same, to be changed.
    pub(super) fn holdings(&mut self) -> impl Iterator<Item = (&NamespacedName, &mut Holding)> {
        self.by_service.iter_mut().map(|(name, holding)| (name, Arc::make_mut(holding)))
    }

    /// Every slice.
    pub(super) fn slices(&self) -> impl Iterator<Item = &EndpointSlice> {
        self.by_service.values().flat_map(|holding| &holding.slices).map(|known| &known.object)
    }

    pub(super) fn service(&self, name: &NamespacedName) -> Option<(&Holding, &Service)> {
        let holding = self.by_service.get(name)?;
        Some((holding, &holding.service.as_ref()?.object))
    }

    /// The listing that named a Service last, to be changed.
    pub(super) fn service_listing(&mut self, name: &NamespacedName) -> Option<&mut u32> {
        self.holding(name)?.service.as_mut().map(|known| &mut known.listing)
    }

    /// The same for a slice.
    pub(super) fn slice_listing(&mut self, name: &NamespacedName) -> Option<&mut u32> {
        self.slice_mut(name).map(|known| &mut known.listing)
    }

    fn slice_mut(&mut self, name: &NamespacedName) -> Option<&mut Known<EndpointSlice>> {
        let holding = Arc::make_mut(self.by_service.get_mut(self.owners.get(name)?)?);
        let index = holding.find(name).ok()?;
        holding.slices.get_mut(index)
    }

    /// A known slice.
    pub(super) fn slice(&self, name: &NamespacedName) -> Option<&EndpointSlice> {
        let holding = self.by_service.get(self.owners.get(name)?)?;
        Some(&holding.slices[holding.find(name).ok()?].object)
    }

    pub(super) fn put_service(&mut self, mut service: Service, listing: u32) {
        let name = self.interned(&service.name);
        service.name = name.clone();
        let holding = Arc::make_mut(self.by_service.entry(name).or_default());
        let before = holding.service.replace(Known { object: service, listing });
        self.services += usize::from(before.is_none());
    }

    /// Puts a slice in the place of the one of its name, which must not belong to another Service.
    pub(super) fn put_slice(&mut self, mut slice: EndpointSlice, listing: u32) {
        let owner = self.interned(&slice.service);
        slice.service = owner.clone();
        let holding = Arc::make_mut(self.by_service.entry(owner.clone()).or_default());
        match holding.find(&slice.name) {
            Ok(index) => holding.slices[index] = Known { object: slice, listing },
            Err(index) => {
                self.owners.insert(slice.name.clone(), owner);
                // Most Services have one, and keep one.
                holding.slices.reserve_exact(1);
                holding.slices.insert(index, Known { object: slice, listing });
            }
        }
    }

    /// Takes a Service away. Its numbering stays until [`Self::tidy`].
    pub(super) fn take_service(&mut self, name: &NamespacedName) -> Option<Service> {
        let service = self.holding(name)?.service.take()?;
        self.services -= 1;
        Some(service.object)
    }

    /// Takes a slice away; returns the Service it belonged to.
    pub(super) fn take_slice(&mut self, name: &NamespacedName) -> Option<NamespacedName> {
        let owner = self.owners.remove(name)?;
        let holding = Arc::make_mut(self.by_service.get_mut(&owner)?);
        if let Ok(index) = holding.find(name) {
            holding.slices.remove(index);
        }
        if holding.service.is_none() && holding.slices.is_empty() && holding.slots.is_empty() {
            self.by_service.remove(&owner);
        }
        Some(owner)
    }

    /// Forgets the numbering of a Service that is gone.
    pub(super) fn tidy(&mut self, name: &NamespacedName) {
        let Some(holding) = self.holding(name) else { return };
        if holding.service.is_none() {
            holding.slots = PortSlots::default();
            if holding.slices.is_empty() {
                self.by_service.remove(name);
            }
        }
    }

    /// The Services that the listing of this number did not name.
    pub(super) fn unnamed_services(&self, listing: u32) -> Vec<NamespacedName> {
        let known = self.by_service.values().filter_map(|holding| holding.service.as_ref());
        let old = known.filter(|known| known.listing != listing);
        old.map(|known| known.object.name.clone()).collect()
    }

    /// The slices that it did not name.
    pub(super) fn unnamed_slices(&self, listing: u32) -> Vec<NamespacedName> {
        let known = self.by_service.values().flat_map(|holding| &holding.slices);
        let old = known.filter(|known| known.listing != listing);
        old.map(|known| known.object.name.clone()).collect()
    }

    /// The name as it is stored already, if it is.
    fn interned(&self, name: &NamespacedName) -> NamespacedName {
        let stored = self.by_service.get_key_value(name).map(|(stored, _)| stored);
        stored.unwrap_or(name).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{name, service, slice};
    use super::*;
    use crate::model::Family;

    #[test]
    fn nothing_is_kept_under_a_name_that_nothing_has() {
        let mut objects = Objects::default();
        objects.put_slice(slice("a-1", "a", &[80]), 1);
        objects.put_slice(slice("a-2", "a", &[80]), 1);
        assert_eq!(objects.take_slice(&name("a-1")), Some(name("a")));
        assert_eq!(objects.take_slice(&name("a-1")), None);
        assert_eq!(objects.slices().count(), 1, "the other one is there still");
        assert_eq!(objects.take_slice(&name("a-2")), Some(name("a")));
        assert!(objects.by_service.is_empty() && objects.owners.is_empty());
        // A Service stays without its slices, and slices without their Service.
        objects.put_service(service("b", 1, &[80]), 1);
        objects.put_slice(slice("b-1", "b", &[80]), 1);
        objects.take_slice(&name("b-1")).unwrap();
        objects.tidy(&name("b"));
        assert!(objects.service(&name("b")).is_some());
        objects.put_slice(slice("b-1", "b", &[80]), 1);
        assert_eq!(objects.take_service(&name("b")).unwrap().name, name("b"));
        assert!(objects.take_service(&name("b")).is_none());
        objects.tidy(&name("b"));
        assert_eq!(objects.slices().count(), 1);
        objects.take_slice(&name("b-1")).unwrap();
        assert!(objects.by_service.is_empty());
    }

    #[test]
    fn the_numbering_of_a_service_that_is_gone_stays_until_its_elements_are() {
        let mut objects = Objects::default();
        let web = service("web", 1, &[80]);
        objects.put_slice(slice("web-1", "web", &[80]), 1);
        objects.put_service(web.clone(), 1);
        let slots = &mut objects.holding(&name("web")).unwrap().slots;
        slots.lists(Family::V4, &web.ports[0]);
        objects.take_service(&name("web")).unwrap();
        objects.take_slice(&name("web-1")).unwrap();
        assert!(!objects.by_service[&name("web")].slots.is_empty());
        objects.tidy(&name("web"));
        assert!(objects.by_service.is_empty());
    }

    #[test]
    fn a_slice_is_found_by_its_name_among_others_of_its_service() {
        let mut objects = Objects::default();
        for (text, ports) in [("web-2", [2]), ("web-3", [3]), ("web-1", [1])] {
            objects.put_slice(slice(text, "web", &ports), 1);
        }
        objects.put_slice(slice("web-2", "web", &[4]), 1);
        for (text, port) in [("web-1", "1"), ("web-2", "4"), ("web-3", "3")] {
            assert_eq!(*objects.slice(&name(text)).unwrap().ports[0].name, *port, "{text}");
            *objects.slice_listing(&name(text)).unwrap() = 2;
        }
        assert_eq!(objects.slice_count(), 3);
        assert_eq!(objects.unnamed_slices(2), []);
        assert_eq!(objects.unnamed_slices(3), ["web-1", "web-2", "web-3"].map(name));
        assert_eq!(objects.slice(&name("web-4")), None);
    }
}
